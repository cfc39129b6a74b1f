import runpy
import subprocess
import sys

from tests.conftest import ROOT
from utils.run.rules import NO_EFFECT, RULES, WITHOUT_EFFECT
from utils.run.settings import SettingError, _constants, parse, read_settings

import pytest

SCRIPTS = [ROOT / f"{stage}.py" for stage in ("pretrain", "sar_feature", "finetune", "results")]
TEXT = """'''A script.'''
from string import ascii_letters as IMPORTED
EPOCHS = 3  # passes
RATE = 0.1
RESUME = True
NAME = "a"
SCALES = (1.0, 2.0)
TURNS = (0, 90)
CLASSES = ()
lower = 1
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(TEXT)
    return runpy.run_path(str(tmp_path / "script.py"))


def test_overrides_take_the_constants_type(script):
    names = script
    arguments = [
        "EPOCHS=5",
        "RATE=1",
        "RESUME=false",
        "NAME=x=y",
        "SCALES=0.5,1",
        "TURNS=(0,)",
        "CLASSES=a,b",
    ]
    settings = read_settings(names, arguments)
    assert settings == {
        "EPOCHS": 5, "RATE": 1.0, "RESUME": False, "NAME": "x=y", "SCALES": (0.5, 1.0), "TURNS": (0,),
        "CLASSES": ("a", "b"),
    }  # fmt: skip
    assert names["EPOCHS"] == 5 and type(settings["RATE"]) is float and names["lower"] == 1


def test_defaults_are_printed(script, capsys):
    read_settings(script, [])
    assert "EPOCHS = 3\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argument, message",
    [
        ("EPOCH=3", "no constant EPOCH; the nearest is EPOCHS"),
        ("epochs=3", "the nearest is EPOCHS"),
        ("EPOCHS=many", "EPOCHS is a whole number, not 'many'"),
        ("EPOCHS=1.5", "EPOCHS is a whole number"),
        ("EPOCHS=", "EPOCHS is a whole number"),
        ("RATE=fast", "RATE is a number"),
        ("RESUME=maybe", "RESUME is True or False"),
        ("TURNS=0,x", "TURNS is a whole number"),
        ("EPOCHS", "write NAME=VALUE"),
        ("IMPORTED=a", "no constant IMPORTED"),
        ("EPOCHS=__import__('os').getcwd()", "EPOCHS is a whole number"),
    ],
)
def test_wrong_settings(script, argument, message):
    with pytest.raises(SettingError, match=message.replace("(", r"\(")):
        read_settings(script, [argument])


@pytest.mark.parametrize("stage, name, meant", [
    ("finetune", "CHECKPOINT", "STUDENT"), ("sar_feature", "student", "TEACHER"), ("results", "TEACHER", "CHECKPOINT"),
])  # fmt: skip
def test_the_name_of_another_stages_checkpoint_leads_to_the_own(stage, name, meant):
    with pytest.raises(SettingError, match=f"no constant {name}; the nearest is {meant}"):
        read_settings({"__file__": str(ROOT / f"{stage}.py")}, [f"{name}=a.pt"])


@pytest.mark.parametrize("text, value", [
    ("", ()), ("0,4095", (0.0, 4095.0)), ("(-30.5, 1e3)", (-30.5, 1000.0)), ("x,1", "a number, not 'x'"),
    ("1", None), ("2,1", None), ("1,1", None), ("0,1,2", None), ("0,1e400", None), ("-1e400,0", None),
])  # fmt: skip
def test_grey_range_is_empty_or_two_finite_numbers(tmp_path, text, value):
    (tmp_path / "script.py").write_text("GREY_RANGE = ()\n")
    script = runpy.run_path(str(tmp_path / "script.py"))
    if isinstance(value, tuple):
        assert read_settings(script, [f"GREY_RANGE={text}"]) == {"GREY_RANGE": value}
        return
    with pytest.raises(SettingError, match=f"GREY_RANGE is {value or 'empty, or two numbers'}"):
        read_settings(script, [f"GREY_RANGE={text}"])


@pytest.mark.parametrize("text, value", [
    ("T-72,2S1 (SPG)", ("T-72", "2S1 (SPG)")), ("(a, b)", ("a", "b")), ("['a', 'b']", ("a", "b")), ("", ()),
    ("(x) a,b", ("(x) a", "b")), ("(a", ("(a",)),
])  # fmt: skip
def test_names_keep_their_brackets(text, value):
    assert parse("CLASSES", text, ()) == value


def test_settings_without_effect_beside_others_are_announced(capsys):
    script = runpy.run_path(str(ROOT / "results.py"))
    read_settings(script, ["VOTE_MIN_SHARE=0.9", "CLUSTERS=3"])  # "auto" may cluster by features
    assert "VOTE_MIN_SHARE has no effect with VOTE=mixture" in (said := capsys.readouterr().out)
    assert said.count("has no effect") == 1
    read_settings(script, ["VOTE=hard", "CLUSTER_BY=both", "CLUSTERS=3", "VOTE_MIN_SHARE=0.9"])
    assert "CLUSTERS has no effect with CLUSTER_BY=both" in (said := capsys.readouterr().out)
    assert said.count("has no effect") == 1


def test_the_settings_of_these_pairs_are_constants_of_one_script():
    scripts = [set(_constants(path)) for path in SCRIPTS]
    for name, (other, values) in WITHOUT_EFFECT.items():
        assert values and any({name, other} <= constants for constants in scripts), name


def test_strings_are_taken_as_they_are():
    assert parse("ROOT", "../a b/[c]", "") == "../a b/[c]"


def test_help_shows_the_constants_with_their_comments(script, capsys):
    with pytest.raises(SystemExit) as exit:
        read_settings(script, ["--help"])
    assert exit.value.code == 0 and "EPOCHS = 3  # passes" in capsys.readouterr().out


def test_help_into_a_closed_pipe_says_nothing():
    command = f"{sys.executable} {ROOT / 'finetune.py'} --help | head -n 0"
    shown = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert shown.returncode == 0 and not shown.stderr


def test_home_and_variables_are_expanded_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch")
    (tmp_path / "script.py").write_text("OUT_DIR = '~/runs'\nTEACHER = ''\nNAME = '~'\n")
    settings = read_settings(runpy.run_path(str(tmp_path / "script.py")), ["TEACHER=$SCRATCH/best.pt"])
    assert settings == {"OUT_DIR": f"{tmp_path}/runs", "TEACHER": "/scratch/best.pt", "NAME": "~"}


@pytest.mark.parametrize("name", sorted({n for p in SCRIPTS for n in _constants(p)}))
def test_numbers_have_a_rule_that_their_defaults_obey(name):
    for path in SCRIPTS:
        if name in _constants(path):
            value = runpy.run_path(str(path))[name]
            numeric = type(value) in (int, float) or isinstance(value, tuple) and value and name != "CLASSES"
            assert not numeric or name in RULES, f"add {name} to utils/run/rules.py"
            if name in RULES:
                rule = RULES[name]
                assert all(map(rule.allows, value)) if rule.several else rule.allows(value)


def test_every_rule_belongs_to_a_constant():
    constants = {name for path in SCRIPTS for name in _constants(path)}
    assert set(RULES) | NO_EFFECT - {"OUT"} <= constants
