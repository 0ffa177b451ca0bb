"""A session recorded by ``tools.run_poc_loop`` and repeated by ``tools.replay_session``."""

from __future__ import annotations

import json

from command_line import ROOT, run_module

from tools import replay_session, run_poc_loop

SHORT = ["characters=1500", "facts=1", "max_new_tokens=4"]


def test_a_session_is_recorded_and_replayed(tmp_path, capsys):
    path = tmp_path / "session.jsonl"
    config = f"--config={ROOT / 'configs/runs/poc_tiny.yaml'}"
    assert run_poc_loop.main([config, "--set", *SHORT, f"record={path}", "--json=-"]) == 0
    done = json.loads(capsys.readouterr().out)

    again = run_module("tools.replay_session", "--set", f"recording={path}", "--json=-")
    assert again.status == 0, again.err
    assert again.result["calls"] == 2
    assert again.result["refocuses"] == done["state"]["rounds"]
    assert again.result["tokens"] >= 1

    *before, answer, end = path.read_text().splitlines()
    values = json.loads(answer)
    values["tokens"][0] += 1
    path.write_text("\n".join([*before, json.dumps(values), end, ""]))
    settings = ["--set", f"recording={path}", f"folder={tmp_path}"]
    assert replay_session.main(settings) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert f"{path}: line 5, call 1 (ask): tokens[0] is " in line, line
    assert (tmp_path / "replay.mctx").is_dir()
