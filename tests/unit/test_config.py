from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field, ValidationError

from megacontext.config import FrozenConfig, load_config
from megacontext.errors import ConfigError


class Inner(FrozenConfig):
    max_edits: int = Field(default=4, ge=1, le=16)
    mode: Literal["exact", "incremental"] = "exact"


class Outer(FrozenConfig):
    seed: int = 0
    rate: float = Field(default=0.1, gt=0)
    name: str = "run"
    levels: tuple[int, ...] = (1, 2)
    inner: Inner = Inner()


class Demanding(FrozenConfig):
    width: int


def refusal(overrides: list[str], config_type: type[FrozenConfig] = Outer) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config_type, None, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_file_and_overrides_meet(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\ninner:\n  max_edits: 8\n  mode: incremental\n")
    config = load_config(
        Outer, path, ["inner.max_edits=2", "levels=[1, 2, 3]", "name=", "rate=1e-3"]
    )
    assert config == Outer(
        seed=3,
        rate=0.001,
        name="",
        levels=(1, 2, 3),
        inner=Inner(max_edits=2, mode="incremental"),
    )


def test_without_a_file_or_with_an_empty_one_the_defaults_hold(tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing set\n")
    assert load_config(Outer, None) == load_config(Outer, empty) == Outer()


def test_the_last_override_of_a_key_counts():
    assert load_config(Outer, None, ["seed=1", "seed=2"]).seed == 2


def test_a_configuration_cannot_be_changed():
    config = Outer()
    with pytest.raises(ValidationError):
        config.seed = 1
    with pytest.raises(ValidationError):
        config.inner.max_edits = 1


@pytest.mark.parametrize("value", [0, 17, 1000])
def test_a_value_out_of_range_is_refused_not_clamped(value):
    message = refusal([f"inner.max_edits={value}"])
    assert "'inner.max_edits'" in message
    assert str(value) in message
    assert "greater than or equal to 1" in message or "less than or equal to 16" in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sede=1", "unknown key 'sede'"),
        ("inner.modus=exact", "unknown key 'inner.modus'"),
        ("inner.mode=loose", "'exact' or 'incremental'"),
        ("seed=many", "'seed' has value 'many'"),
        ("seed=1.5", "'seed' has value 1.5"),
        ("seed", "expected KEY=VALUE"),
        ("=1", "expected KEY=VALUE"),
        ("seed=[1", "not valid YAML"),
        ("seed.part=1", "'seed'"),
    ],
)
def test_a_wrong_override_is_refused_with_its_reason(override, said):
    assert said in refusal([override])


def test_an_override_cannot_turn_a_value_into_keys():
    assert "'seed' holds a value, not keys" in refusal(["seed=1", "seed.part=2"])


def test_a_missing_key_is_named():
    assert "key 'width' is missing" in refusal([], Demanding)


def test_all_problems_are_told_at_once():
    message = refusal(["sede=1", "inner.max_edits=99", "rate=0"])
    assert all(key in message for key in ("'sede'", "'inner.max_edits'", "'rate'"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"seed: [1", "not valid YAML"),
        (b"- 1\n- 2\n", "expected a mapping"),
        (b"just text", "expected a mapping"),
        (b"name: \xff\xfe", "cannot be read"),
        (b"seed: 1\nsede: 2\n", "unknown key 'sede'"),
        (b"!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_named_with_its_reason(tmp_path, content, said):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(Outer, path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(Outer, tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Outer, tmp_path)


def test_a_wrong_default_is_found_when_the_class_is_used():
    class Wrong(FrozenConfig):
        width: int = Field(default=0, ge=1)

    with pytest.raises(ValidationError):
        Wrong()
