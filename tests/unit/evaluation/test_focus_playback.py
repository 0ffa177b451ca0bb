from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from megacontext.errors import InputError
from megacontext.evaluation.focus_playback import Frame, playback_html, write_playback
from megacontext.runtime.focus_loop import FocusRecord
from megacontext.runtime.focus_scores import Edit

HOSTILE = ["</script><b>out</b>", "<!-- <script>", "</SCRIPT >", "a\u2028b & \"c\" '__DATA__'"]


class Reader(HTMLParser):
    """Collects elements, attributes and the text of scripts, as a browser's parser would."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.scripts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script" and self.cdata_elem:
            self.scripts[-1] += data


def record(round_=0):
    edit = Edit("expand", 1, 32, 64, 0.123456, 31, "proposal", ((1, 32),))
    return FocusRecord(
        round=round_,
        cursor=64,
        policy="lexical",
        spans=torch.tensor([[1, 0, 32], [0, 32, 64]]),
        proposals=((1, 0.5),),
        edits=(edit,),
        cost=33,
    )


def page_of(title="demo", frame_title="a question"):
    frames = [Frame(frame_title, record(0)), Frame("after", record(1))]
    return playback_html(frames, title=title, total_tokens=64, budget=48, marks=[40])


def data_of(page):
    reader = Reader()
    reader.feed(page)
    (script,) = reader.scripts
    return json.loads(re.search(r"const data = (.*);\n", script).group(1))


def test_the_page_holds_everything_and_fetches_nothing():
    page = page_of()
    reader = Reader()
    reader.feed(page)
    assert not re.search(r"https?:|//\w+\.|\bsrc\s*=|@import|url\(|fetch\(|import\(", page)
    assert not {name for name, _ in reader.attributes} & {"src", "href", "srcset", "data"}
    assert not set(reader.tags) & {"link", "img", "iframe", "object"}
    assert "__DATA__" not in page


def test_the_frames_are_json():
    data = data_of(page_of())
    assert data["title"] == "demo"
    assert (data["total"], data["budget"], data["marks"]) == (64, 48, [40])
    assert [frame["title"] for frame in data["frames"]] == ["a question", "after"]
    assert data["frames"][1] == {
        "title": "after",
        "round": 1,
        "cursor": 64,
        "cost": 33,
        "spans": [[1, 0, 32], [0, 32, 64]],
        "edits": [["expand", 1, 32, 64, 0.123, "proposal"]],
    }


@pytest.mark.parametrize("text", HOSTILE)
def test_no_title_breaks_out_of_the_script(text):
    page = page_of(text, text)
    plain, hostile = Reader(), Reader()
    plain.feed(page_of())
    hostile.feed(page)
    assert hostile.tags == plain.tags
    data = data_of(page)
    assert data["title"] == data["frames"][0]["title"] == text
    script = page[page.index("<script>") + 8 : page.rindex("</script>")]
    assert not re.search(r"<!--|<script|</script", script, re.IGNORECASE)


def test_every_element_that_the_script_asks_for_is_there():
    page = page_of()
    reader = Reader()
    reader.feed(page)
    ids = {value for name, value in reader.attributes if name == "id"}
    assert set(re.findall(r'byId\("(\w+)"\)', page)) <= ids


def test_the_file_is_the_page(tmp_path):
    path = tmp_path / "focus.html"
    write_playback(path, [Frame("ü", record())], title="t", total_tokens=64, budget=48)
    assert path.read_text("utf-8") == playback_html(
        [Frame("ü", record())], title="t", total_tokens=64, budget=48
    )


def test_a_playback_without_frames_is_refused():
    with pytest.raises(InputError, match="'empty': there is no frame"):
        playback_html([], title="empty", total_tokens=1, budget=1)
