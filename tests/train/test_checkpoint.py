"""Checkpoints and run folders: damage is named, nothing is left half written."""

import pytest
import torch

from ssmkit.train.checkpoint import RunError, load_checkpoint, read_config, save_checkpoint, write_config

GOOD = {"state_dict": {"model.weight": torch.arange(1000.0)}, "global_step": 3}


def cut(fraction):
    def change(path):
        path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])

    return change


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


DAMAGE = {
    "cut in the middle": (cut(0.5), "truncated or corrupt"),
    "cut at the end": (cut(0.99), "truncated or corrupt"),
    "empty": (cut(0.0), "truncated or corrupt"),
    "text": (lambda path: path.write_text("not a checkpoint"), "truncated or corrupt"),
    "something else": (lambda path: torch.save([1, 2], path), "not a training checkpoint"),
    "no weights": (lambda path: torch.save({"global_step": 1}, path), "has no state_dict"),
    "code instead of numbers": (lambda path: torch.save({"state_dict": print}, path), "truncated or corrupt"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage, message):
    path = tmp_path / "last.ckpt"
    save_checkpoint(GOOD, path)
    assert torch.equal(load_checkpoint(path)["state_dict"]["model.weight"], torch.arange(1000.0))
    damage(path)
    with pytest.raises(RunError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_a_flipped_byte_is_noticed(tmp_path):
    """In the numbers themselves: the archive's checksums must catch it."""
    path = tmp_path / "last.ckpt"
    save_checkpoint(GOOD, path)
    flip_a_byte(path)
    with pytest.raises(RunError, match="truncated or corrupt"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path):
    path = tmp_path / "last.ckpt"
    save_checkpoint(GOOD, path)
    before = path.read_bytes()
    with pytest.raises((TypeError, AttributeError)):
        save_checkpoint({"state_dict": (x for x in range(3))}, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_missing_and_damaged_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError, match=r"not a run folder \(it has no config.json\)"):
        read_config(tmp_path)
    write_config(tmp_path, {"kind": "trajectory"})
    assert read_config(tmp_path) == {"kind": "trajectory"}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config.json is corrupt"):
        read_config(tmp_path)
