"""Tokenizers of others: GPT-2's form with OPT's order of ids, Llama 3's names, and wrong ones."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Tokenizer

from megatron_jam.data.prepare.text import load_text_folder
from tests.helpers.commands import failure, run_tool

TEXT = "Hello hello, héllo </s> \N{LEMON} <pad>"


def opt_files(folder):
    """vocab.json and merges.txt in OPT's form: specials first, and a mask at the end."""
    folder.mkdir()
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u0120", "hello")]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())[::-1] + ["".join(each) for each in merges]
    names = ["<s>", "<pad>", "</s>", "<unk>", *pieces, "<|endoftext|>", "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}")
    return names


def test_opts_files_keep_their_ids(tmp_path):
    names = opt_files(tmp_path / "opt")
    run_tool("import_tokenizer", tmp_path / "opt", tmp_path / "out", "--num_image_codes", 16)
    tokenizer, vocabulary = load_text_folder(tmp_path / "out")
    assert (vocabulary.bos, vocabulary.pad, vocabulary.eos, vocabulary.unk) == (0, 1, 2, 3)
    assert vocabulary.text == (0, len(names))
    ids = tokenizer.encode("hello hello")
    assert [names[i] for i in ids] == ["hello", "\u0120hello"]
    other = GPT2Tokenizer(str(tmp_path / "opt/vocab.json"), str(tmp_path / "opt/merges.txt"))
    plain = "Hello hello, h\u00e9llo \N{LEMON}"
    assert tokenizer.encode(plain) == other(plain)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert not {0, 1, 2, 3} & set(tokenizer.encode(TEXT))  # no text brings in a special one


def test_other_names_and_missing_ones(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({name: i for i, name in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    run_tool("import_tokenizer", tmp_path / "tokenizer.json", tmp_path / "out")
    _, vocabulary = load_text_folder(tmp_path / "out")
    assert (vocabulary.bos, vocabulary.eos) == (256, 257)
    assert (vocabulary.pad, vocabulary.unk) == (259, 260)  # added behind
    assert vocabulary.image == (261, 8192)
    run_tool("import_tokenizer", tmp_path, tmp_path / "chat", "--eos", "<|eot_id|>")
    assert load_text_folder(tmp_path / "chat")[1].eos == 258


def test_wrong_ones_are_named(tmp_path, capsys):
    opt_files(tmp_path / "opt")
    arguments = "import_tokenizer", tmp_path / "opt", tmp_path / "out"
    assert "has no token '<end>'" in failure(capsys, *arguments, "--eos", "<end>")
    vocab = json.loads((tmp_path / "opt/vocab.json").read_text())
    del vocab["a"]
    (tmp_path / "opt/vocab.json").write_text(json.dumps(vocab))
    assert "lacks 1 of the 256 bytes, such as 'a'" in failure(capsys, *arguments)
    (tmp_path / "opt/merges.txt").unlink()
    assert "are no byte-level BPE" in failure(capsys, *arguments)
    assert not (tmp_path / "out").exists()
