"""install(): mamba_ssm and causal_conv1d are found where they are absent, and are gone again afterwards."""

import importlib
import importlib.metadata
import importlib.util
import sys

import pytest

import ssmkit
from ssmkit.backends import _unusable
from ssmkit.interop import install, uninstall
from ssmkit.interop.finder import VERSIONS

ABSENT = [name for name in VERSIONS if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(len(ABSENT) < 2, reason="needs a machine without mamba_ssm and causal_conv1d")
# What published model code imports.
PATHS = """
    causal_conv1d: causal_conv1d_fn causal_conv1d_update
    causal_conv1d.causal_conv1d_interface: causal_conv1d_fn causal_conv1d_update causal_conv1d_ref causal_conv1d_update_ref
    causal_conv1d.causal_conv1d_varlen: causal_conv1d_varlen_states
    mamba_ssm: Mamba Mamba2 Mamba3 MambaLMHeadModel selective_scan_fn mamba_inner_fn
    mamba_ssm.ops.selective_scan_interface: selective_scan_fn selective_scan_ref mamba_inner_fn mamba_inner_ref
    mamba_ssm.ops.triton.selective_state_update: selective_state_update selective_state_update_ref
    mamba_ssm.ops.triton.ssd_combined: mamba_chunk_scan_combined mamba_chunk_scan mamba_split_conv1d_scan_combined
    mamba_ssm.ops.triton.layernorm_gated: RMSNorm LayerNorm rmsnorm_fn layernorm_fn
    mamba_ssm.ops.triton.layer_norm: RMSNorm layer_norm_fn rms_norm_fn layer_norm_linear_fn layer_norm_ref rms_norm_ref
    mamba_ssm.ops.triton.k_activations: swiglu
    mamba_ssm.ops.triton.ssd_chunk_state: chunk_state chunk_state_ref chunk_state_varlen
    mamba_ssm.ops.triton.ssd_state_passing: state_passing state_passing_ref
    mamba_ssm.ops.triton.ssd_chunk_scan: chunk_scan chunk_scan_ref
    mamba_ssm.distributed.tensor_parallel: ColumnParallelLinear RowParallelLinear
    mamba_ssm.distributed.distributed_utils: all_reduce reduce_scatter
    mamba_ssm.modules.mamba_simple: Mamba Block
    mamba_ssm.modules.mamba2: Mamba2
    mamba_ssm.modules.mamba2_simple: Mamba2Simple
    mamba_ssm.modules.block: Block
    mamba_ssm.modules.mlp: GatedMLP
    mamba_ssm.modules.mha: MHA
    mamba_ssm.modules.ssd_minimal: ssd_minimal_discrete segsum
    mamba_ssm.models.config_mamba: MambaConfig
    mamba_ssm.models.mixer_seq_simple: MambaLMHeadModel MixerModel create_block
    mamba_ssm.utils.generation: InferenceParams GenerationMixin decode sample
    mamba_ssm.utils.determinism: set_deterministic_mode use_deterministic_mode
    mamba_ssm.utils.torch: custom_bwd custom_fwd
    mamba_ssm.utils.hf: load_config_hf load_state_dict_hf
"""


@pytest.fixture(autouse=True)
def nothing_installed():
    uninstall()
    yield
    uninstall()


def test_every_name_is_found_and_is_ssmkits():
    with install() as served:
        assert served == ("causal_conv1d", "mamba_ssm")
        for line in PATHS.strip().splitlines():
            path, names = line.strip().split(": ")
            module = importlib.import_module(path)
            assert module is importlib.import_module(f"ssmkit.interop.{path}")
            assert all(hasattr(module, name) for name in names.split()), line
        import mamba_ssm
        from mamba_ssm import Mamba

        assert Mamba is ssmkit.nn.Mamba and mamba_ssm.modules.mamba_simple.Mamba is Mamba
    for name in VERSIONS:
        assert not any(key == name or key.startswith(f"{name}.") for key in sys.modules)
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_metadata_say_whose_it_is():
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("mamba-ssm")
    with install():
        for name in VERSIONS:
            assert importlib.util.find_spec(name) is not None
            version = importlib.metadata.version(name.replace("_", "-"))
            assert version == importlib.metadata.version(name) == f"{VERSIONS[name]}+ssmkit.{ssmkit.__version__}"
            assert importlib.import_module(name).__version__ == version
        assert name in importlib.metadata.packages_distributions()
        with pytest.raises(ModuleNotFoundError, match=r"mamba_ssm\.nothing"):
            importlib.import_module("mamba_ssm.nothing")
    assert importlib.util.find_spec("mamba_ssm") is None


def test_twice_is_once():
    first = install()
    with install() as second:
        assert second == first
    # the inner context added nothing, so it took nothing away
    assert importlib.util.find_spec("causal_conv1d") is not None
    uninstall("causal_conv1d")
    assert importlib.util.find_spec("causal_conv1d") is None and importlib.util.find_spec("mamba_ssm") is not None
    uninstall()
    assert importlib.util.find_spec("mamba_ssm") is None
    with pytest.raises(ValueError, match="name must be one of mamba_ssm, causal_conv1d, got 'mamba'"):
        uninstall("mamba")


def test_installed_packages_are_left_alone_unless_forced(tmp_path, monkeypatch):
    (tmp_path / "causal_conv1d").mkdir()
    (tmp_path / "causal_conv1d" / "__init__.py").write_text("whose = 'theirs'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with install() as served:
        assert served == ("mamba_ssm",)
        theirs = importlib.import_module("causal_conv1d")
        assert theirs.whose == "theirs"
        with install(force=True) as forced:
            assert forced == ("causal_conv1d", "mamba_ssm")
            assert hasattr(importlib.import_module("causal_conv1d"), "causal_conv1d_fn")
        assert importlib.import_module("causal_conv1d") is theirs
    del sys.modules["causal_conv1d"]


def test_a_served_package_is_no_rival_of_itself():
    """The op's table lists the package causal-conv1d; ssmkit under that name must not stand in for it."""
    why = _unusable.__wrapped__  # not what was found out before
    with install():
        for _ in ("before its import", "after it"):
            assert "`ssmkit.interop` answers to its name" in why("causal_conv1d", "causal_conv1d")
            importlib.import_module("causal_conv1d")
    assert why("causal_conv1d", "causal_conv1d") == "the package causal_conv1d is not installed"
