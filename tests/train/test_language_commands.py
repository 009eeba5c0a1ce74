"""ssmkit train language and ssmkit generate: the job from files to text, in miniature; mistakes without tracebacks."""

import json
import shlex

import pytest
import torch
from data.factories import save_tokenizer

pytest.importorskip("lightning")

from ssmkit.cli import main
from ssmkit.data.vocabulary import TokenizerVocabulary
from ssmkit.models.language import language_model, save
from ssmkit.train.commands.generate import open_model

TINY = shlex.split(
    "--set d_model=32 n_layer=2 attn_layer_idx=(1,) d_state=16 --batch-size 2 --context 16 --steps 3 "
    "--valid-every 2 --sample-bytes 5 --accelerator cpu --devices 1"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of text and a run trained on it."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "notes").mkdir()
    for index in range(4):
        (folder / "notes" / f"{index}.txt").write_text(f"note {index}: naïve café\n" * (10 + index))
    return folder, ["train", "language", "--data", str(folder / "notes"), "--held-out", "0.3", *TINY]


def run(capsys, *argv):
    status = main([str(part) for part in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_job_from_files_to_text(trained, capsys):
    folder, train = trained
    status, out, _ = run(capsys, *train, "--out", folder / "run")
    assert status == 0
    assert "of 3 files\nheld out: " in out
    results = json.loads((folder / "run" / "results.json").read_text())
    assert f"held out: {results['held_out']:.3f} bits per byte over" in out
    assert f"gzip -9 of the same: {results['gzip_each']:.3f} file by file" in out
    assert "step 2: " in out
    assert "  | note " in out
    status, _, err = run(capsys, *train, "--out", folder / "run")
    assert status == 2
    assert "already holds a run" in err
    status, again, _ = run(capsys, *train, "--out", folder / "run", "--resume")
    assert status == 0
    assert f"held out: {results['held_out']:.3f} bits per byte over" in again

    write = ["generate", folder / "run", "--tokens", 12, "--temperature", 2, "--seed", 5]
    status, out, err = run(capsys, *write, "--prompt", "note")
    assert status == 0
    assert "5 tokens read in" in err
    assert "tokens/s" in err
    assert run(capsys, *write, "--prompt", "note")[1] == out
    (folder / "prompt.txt").write_text("note")
    assert run(capsys, *write, "--prompt-file", folder / "prompt.txt")[1] == out
    assert run(capsys, *write, "--prompt", "note", "--seed", 6)[1] != out
    status, several, err = run(capsys, *write, "--batch", 3)
    assert status == 0
    assert [line for line in several.splitlines() if line.startswith("--- ")] == ["--- 1", "--- 2", "--- 3"]
    assert "3 x" in err


def test_what_is_printed_is_what_the_model_generates(trained, capsys, tmp_path):
    """Greedy, from a folder of weights, token by token as in one call."""
    torch.manual_seed(0)
    model = language_model("byte-hybrid", d_model=32, n_layer=2, attn_layer_idx=(1,))
    save(model, tmp_path / "weights")
    status, out, _ = run(capsys, "generate", tmp_path / "weights", "--prompt", "ab", "--tokens", 20, "--temperature", 0)
    assert status == 0
    ids = model.eval().generate(torch.tensor([[0, 97, 98]]), 20, temperature=0.0)[0, 3:].tolist()
    written = ids[: ids.index(0)] if 0 in ids else ids
    assert out == bytes(written).decode("utf-8", "replace") + "\n"


def test_held_out_files_of_their_own(trained, capsys, tmp_path):
    folder, train = trained
    status, out, _ = run(capsys, *train, "--valid", folder / "notes" / "0.txt", "--out", tmp_path / "run")
    assert status == 0
    assert "of 3 files" in out
    status, _, err = run(capsys, *train, "--valid", folder / "notes", "--out", tmp_path / "other")
    assert status == 2
    assert "nothing is left to train on" in err


TRAIN = ["train", "language", "--out", "mistake", "--data"]
MISTAKES = {
    "no such text": ([*TRAIN, "nowhere"], "no text at nowhere"),
    "all held out": ([*TRAIN, "notes", "--held-out", "1"], "fraction must lie in (0, 1), got 1.0"),
    "an unknown variant": ([*TRAIN, "notes", "--variant", "huge"], "unknown variant 'huge'"),
    "an unknown setting": ([*TRAIN, "notes", "--set", "size=3"], "have no option size"),
    "no run": (["generate", "nothing"], "no run and no weights at nothing"),
    "nothing to write": (["generate", "notes", "--tokens", "0"], "--tokens must be at least 1, got 0"),
    "no prompt file": (["generate", "notes", "--prompt-file", "none.txt"], "no prompt at none.txt"),
    "a folder of something else": (["generate", "notes"], "config.json"),
}


@pytest.mark.parametrize(("argv", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_with_a_message(argv, message, trained, capsys, monkeypatch):
    monkeypatch.chdir(trained[0])
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert err.startswith("ssmkit: error: ")
    assert message in err
    assert "Traceback" not in err
    assert not (trained[0] / "mistake").exists()


def test_words_are_written_with_their_tokenizer(capsys, tmp_path):
    """From the folder of weights or named: the text is that of the tokens, up to the end of text."""
    torch.manual_seed(1)
    model = language_model("byte-hybrid", vocab_size=300, d_model=32, n_layer=2, attn_layer_idx=(1,))
    save(model, tmp_path / "weights")
    vocabulary = TokenizerVocabulary(save_tokenizer(tmp_path))
    write = ["generate", tmp_path / "weights", "--prompt", "the line", "--tokens", 12, "--temperature", 0]
    status, out, _ = run(capsys, *write, "--tokenizer", tmp_path / "tokenizer.json")
    assert status == 0
    prompt = vocabulary.encode("the line")
    ids = model.eval().generate(torch.tensor([prompt]), 12, eos_token_id=0)[0].tolist()
    expected = vocabulary.tokenizer.decode(ids)
    assert "the line" + out == expected + "\n"
    save_tokenizer(tmp_path / "weights")
    assert run(capsys, *write)[1] == out


def test_the_tokenizer_of_another_model_is_refused(capsys, tmp_path):
    save(language_model("byte-hybrid", vocab_size=64, d_model=32, n_layer=1, attn_layer_idx=()), tmp_path)
    save_tokenizer(tmp_path)
    status, _, err = run(capsys, "generate", tmp_path, "--prompt", "the line")
    assert status == 2
    assert "the model has 64; take the model's own" in err


def test_weights_with_words_need_their_tokenizer(tmp_path):
    save(language_model("byte-hybrid", vocab_size=512, d_model=32, n_layer=1, attn_layer_idx=()), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer.json, and a model of 512 tokens"):
        open_model(str(tmp_path), None)
