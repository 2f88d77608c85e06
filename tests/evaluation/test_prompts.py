import hashlib
import sys
import types
from pathlib import Path

import pytest

from diffusion_tokred.errors import ConfigError
from diffusion_tokred.evaluation import prompts
from diffusion_tokred.evaluation.prompts import PromptSet, load
from diffusion_tokred.zoo import scenes


def write(folder: Path, name: str, data: str | bytes) -> str:
    file = folder / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(file)


def test_scenes_are_the_fixed_ones_in_order():
    found = load("scenes", limit=7)
    assert found.texts == tuple(scenes.caption(scene) for scene in scenes.evaluation_scenes(7))
    assert (found.name, found.n, found.ids) == ("scenes", 7, tuple("0123456"))
    assert load("scenes").n == 512
    held_out = load("scenes-held-out", limit=7)
    assert held_out.texts == tuple(map(scenes.caption, scenes.evaluation_scenes(7, held_out=True)))
    assert not set(held_out.texts) & set(found.texts)


def test_text_file_keeps_every_line(tmp_path):
    file = write(tmp_path, "p.txt", "\ufeffa cat\r\n  a \u2028 dog \n\u4e00\u53ea\u732b, \u00e9\na cat\n\n")
    found = load(file)
    assert found.texts == ("a cat", "a \u2028 dog", "\u4e00\u53ea\u732b, \u00e9", "a cat")
    assert (found.name, found.n, found.unique, found.ids) == ("p.txt", 4, 3, None)
    assert found.sha256 == hashlib.sha256("\n".join(found.texts).encode()).hexdigest()
    assert load(file, limit=2).texts == found.texts[:2]
    assert load(file, limit=99).texts == found.texts
    assert load(file, unique=True).texts == found.texts[:3]


def test_repeats_are_dropped_before_the_limit_and_ids_go_along():
    many = PromptSet("x", ("a", "b", "a", "c", "b"), tuple("01234"))
    assert many.without_repeats() == PromptSet("x", ("a", "b", "c"), ("0", "1", "3"))
    assert many.without_repeats().first(2).ids == ("0", "1")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("p.csv", 'id,Prompt,text\n7,"a cat, black",x\n8,"two\nlines",y\n'),
        ("p.tsv", "id\tPrompt\ttext\n7\ta cat, black\tx\n8\t\"two\nlines\"\ty\n"),
        (
            "p.jsonl",
            '{"id": 7, "prompt": "a cat, black", "text": "x"}\n\n{"id": 8, "prompt": "two\\nlines", "text": "y"}',
        ),
    ],
)  # fmt: skip
def test_tables(tmp_path, name, data):
    file = write(tmp_path, name, data)
    assert load(file) == PromptSet(name, ("a cat, black", "two\nlines"), ("7", "8"))
    assert load(file, column="text").texts == ("x", "y")
    with pytest.raises(ConfigError, match=r"no column 'caption': its columns are 'id', '[Pp]rompt', 'text'"):
        load(file, column="caption")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", "", "has no prompts: it is empty"),
        ("p.txt", " \n\n", "has no prompts: it is empty"),
        ("p.txt", "a cat\n\na dog\n", r"line 2 of .*p\.txt is empty"),
        ("p.txt", b"a cat\nb\nblack \xe9 dog\n", r"line 3 of .*p\.txt is not UTF-8 \(byte 0xe9\)"),
        ("p.txt", "a cat\n".encode("utf-16"), "is UTF-16"),
        ("p.txt", "a cat\na\0dog\n", "line 2 .* NUL"),
        ("p.csv", "", "has no prompts"),
        ("p.csv", "prompt\n", "has no prompts"),
        ("p.csv", "name,words\na,b\n", r"none of the columns prompt, caption, text: its columns are 'name', 'words'"),
        ("p.csv", "id,prompt\n1,a cat\n2,\n", "line 3 .* is empty where the prompt should be"),
        ("p.csv", "id,prompt\n1,a cat, black\n", "line 2 .* has 3 fields, the first line has 2"),
        ("p.csv", "id,prompt\n1,a\n2\n", "line 3 .* has 1 fields, the first line has 2"),
        ("p.csv", 'id,prompt\n1,"a cat\n', "cannot be read"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 .* is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n["b"]\n', r"line 2 .* is no object .*\[\"b\"\]"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"caption": "b"}\n', "line 3 .* has no text for 'prompt'"),
        ("p.jsonl", '{"prompt": 3}\n', "line 1 .* has no text for 'prompt': it has 3"),
        ("p.json", "[]", r"name a file that ends in \.txt, \.csv, \.tsv, \.jsonl"),
    ],
)
def test_bad_files_say_where(tmp_path, name, data, message):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, name, data))


def test_bad_sources(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the prompts .*none\.txt: No such file"):
        load(str(tmp_path / "none.txt"))
    with pytest.raises(ConfigError, match="is a folder"):
        load(str(tmp_path))
    with pytest.raises(ConfigError, match="it is none of scenes, scenes-held-out, no file"):
        load("scene")
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        load("scenes", limit=0)
    with pytest.raises(ConfigError, match="has no columns"):
        load("scenes", column="x")
    with pytest.raises(ConfigError, match="prompt 1 of x is no text, or empty"):
        PromptSet("x", ("a", " "))


class Table(dict):
    """What `datasets.load_dataset` returns, as far as it is used."""

    column_names = property(list)

    def __len__(self) -> int:
        return len(next(iter(self.values())))


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set of two splits; `hub.error` is what it answers instead."""
    import huggingface_hub

    class Api:
        def dataset_info(self, name, timeout):
            assert timeout <= 10
            if fake.error:
                raise fake.error

    fake = types.SimpleNamespace(
        error=None,
        get_dataset_split_names=lambda name: ["train", "test"],
        load_dataset=lambda name, split: Table(text=[f"{split} a", f"{split} b"], words=["c", "d"], id=[5, 6]),
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return fake


def test_a_data_set_of_the_hub(hub):
    assert load("me/captions:test") == PromptSet("me/captions:test", ("test a", "test b"), ("5", "6"))
    assert load("me/captions:train:words").texts == ("c", "d")
    with pytest.raises(ConfigError, match="the splits of me/captions are train, test: name one, as me/captions:train"):
        load("me/captions")
    with pytest.raises(ConfigError, match="no column 'x': its columns are 'text', 'words', 'id'"):
        load("me/captions:test:x")


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    hub.error = OSError("no route")
    with pytest.raises(ConfigError, match="cannot be reached for the data set me/captions: HF_HUB_OFFLINE=1"):
        load("me/captions:test")
    hub.error = OSError("404")
    hub.error.response = types.SimpleNamespace(status_code=404)
    with pytest.raises(ConfigError, match="has no data set me/captions, or it is private"):
        load("me/captions:test")

    import huggingface_hub

    def nothing(name):
        raise ConnectionError("not in the cache")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.get_dataset_split_names = nothing
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set: fetch it where there is a network"):
        load("me/captions:test")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # import fails
    with pytest.raises(ConfigError, match="pip install datasets"):
        load("me/captions")


def test_names_of_pictures_start_with_the_prompts_hash():
    assert prompts.sha8("a cat") == hashlib.sha256(b"a cat").hexdigest()[:8]
