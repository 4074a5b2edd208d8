"""Import the Doc-to-LoRA authors' released checkpoints (`pytorch_model.bin`) as our hypernetwork.

Their file is a pickle inside a zip archive: tensors, two configuration objects, and the base model's name. We read it
with an unpickler that knows the few globals such a file needs, puts inert stand-ins in place of their classes, and
refuses everything else; torch's own loader is not involved, and storages go to the CPU wherever they were saved.
What comes out is an ordinary `Hypernetwork` with the `perceiver` generator, which saves as safetensors and JSON.
"""

import collections
import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2l.base_model import BaseModel
from d2l.chunking import ChunkingConfig
from d2l.context_encoder import EncoderConfig
from d2l.errors import UserError
from d2l.hypernetwork import Hypernetwork, HypernetworkConfig

_ENCODER_KINDS = {"early_exit": "early_exit", "per_layer_activations": "per_layer"}
_CHUNK_TOKENS = 512  # what the authors trained with; their checkpoints do not say
_HEADS, _KV_HEADS, _HEAD_DIM = 16, 4, 128  # constants of their code, likewise


def load(path: str | Path, base: BaseModel) -> Hypernetwork:
    """Read a checkpoint of the authors for `base`, in the base model's dtype and on its device.

    Args:
        path: their `pytorch_model.bin`, or the folder it is in.
        base: the model it was trained for; sizes are checked, and a different name is warned about.

    Raises:
        UserError: no such file, damaged, not such a checkpoint, of a kind we cannot run, or for another base model.
    """
    path = Path(path)
    path = path / "pytorch_model.bin" if path.is_dir() else path
    state = _read(path)
    try:
        theirs, encoder = state.pop("hypernet_config"), state.pop("ctx_encoder_args")
        name = str(state.pop("base_model_name_or_path"))
        config = _config(theirs, encoder, name, base, str(path))
        with torch.device("meta"):
            hypernetwork = Hypernetwork(config, base)
        renamed = _tensors(state, hypernetwork)
        tensors = {k: t.to(base.device, base.dtype).contiguous() for k, t in renamed.items()}
        hypernetwork.load_state_dict(tensors, assign=True)
    except UserError:
        raise
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise UserError(f"{path}: not a Doc-to-LoRA checkpoint, or one of an unknown layout ({reason})") from error
    if Path(name).name.lower() != Path(base.name).name.lower():
        warnings.warn(f"{path} was trained for base model {name}, not {base.name}; answers may suffer", stacklevel=2)
    return hypernetwork.eval()


def _config(theirs: Any, encoder: Any, name: str, base: BaseModel, where: str) -> HypernetworkConfig:
    """Our configuration for theirs; refuses what has no counterpart here or does not fit `base`."""
    aggregator, lora = theirs.aggregator_config, theirs.lora_config
    modules = tuple(sorted(lora.target_modules))
    unsupported = {
        "ctx_encoder_type": encoder.ctx_encoder_type not in _ENCODER_KINDS,
        "ctx_encoder_model_name_or_path": encoder.ctx_encoder_model_name_or_path not in (None, name),
        "aggregator_type": aggregator.aggregator_type != "perceiver",
        "num_self_attn_per_block": aggregator.num_self_attn_per_block != 0,
        "per_rank_gen": not theirs.per_rank_gen,
        "extra_modules": bool(theirs.extra_modules),
        "ctx_encoder_last_layer": getattr(encoder, "ctx_encoder_last_layer", None) not in (None, len(base.layers)),
    }
    if found := [setting for setting, is_unsupported in unsupported.items() if is_unsupported]:
        values = {k: v for part in (aggregator, theirs, encoder) for k, v in vars(part).items()}
        settings = ", ".join(f"{setting} = {values[setting]!r}" for setting in found)
        raise UserError(f"{where}: cannot be imported: {settings} has no counterpart in the perceiver generator")
    made_for = {
        "layers": len(theirs.layer_indices),
        "hidden size": aggregator.feature_size,
        **{module: tuple(sizes[module] for sizes in theirs.feature_sizes) for module in modules},
    }
    given = {"layers": len(base.layers), "hidden size": base.hidden_size}
    firsts = {module: base.targets(module)[0] for module in modules}
    given |= {module: (linear.in_features, linear.out_features) for module, linear in firsts.items()}
    if made_for != given:
        raise UserError(f"{where}: made for a base model with {made_for}, but {base.name} has {given}; use the former")
    kind = _ENCODER_KINDS[encoder.ctx_encoder_type]
    return HypernetworkConfig(
        generator="perceiver",
        generator_config={
            "width": theirs.latent_size,
            "latents": aggregator.n_latent_queries,
            "blocks": aggregator.num_blocks,
            "heads": _HEADS,
            "kv_heads": _KV_HEADS,
            "head_dim": _HEAD_DIM,
            "row_mlps": _or_default(theirs, "num_pre_head_layers", 4),
            "row_mlps_per_layer": theirs.per_layer_processing,
        },
        encoder=EncoderConfig(kind, encoder.layer_idx if kind == "early_exit" else None),  # type: ignore[arg-type]
        target_modules=modules,
        rank=lora.r,
        bias_rank=lora.r if _or_default(theirs, "use_bias", True) else 0,
        scale=float(lora.lora_alpha),  # they apply it as it is, not divided by the rank
        chunking=ChunkingConfig(max_chunk_tokens=min(_CHUNK_TOKENS, base.window - base.affixes.length)),
    )


def _or_default(config: Any, name: str, default: Any) -> Any:
    """A field that older checkpoints lack or leave empty."""
    value = getattr(config, name, None)
    return default if value is None else value


_RENAMED = (
    (r"^aggregator\.perceiver\.modality_projection\.", "generator.project."),
    (r"^aggregator\.perceiver\.(encoder|decoder)\.layers\.", r"generator.\1.blocks."),
    (r"^aggregator\.perceiver\.", "generator."),
    (r"\.latents_q$", ".queries"),
    (r"\.(gate|up|down)_proj\.weight$", r".\1.weight"),
    (r"\.self_attn\.([qkvo])_proj\.", r".attention.\1."),
    (r"\.input_(latents|context)_layernorm\.", r".\1_norm."),
    (r"\.post_attention_layernorm\.", ".attention_norm."),
    (r"\.pre_ff_layernorm\.", ".mlp_norm_in."),
    (r"\.post_ff_layernorm\.", ".mlp_norm_out."),
    (r"\.layernorm\.", ".norm."),
    (r"^layers\.(\d+)\.(?:layers|mlp)\.0\.", r"generator.row_mlps.\1.norm_in."),  # `mlp` is shared by all layers
    (r"^layers\.(\d+)\.(?:layers\.1|mlp\.2)\.", r"generator.row_mlps.\1.up."),
    (r"^layers\.(\d+)\.(?:layers\.3|mlp\.5)\.", r"generator.row_mlps.\1.down."),
    (r"^layers\.(\d+)\.(?:layers\.4|mlp\.6)\.", r"generator.row_mlps.\1.norm_out."),
    (r"^scaler_A\.", "generator.scale_a."),
    (r"^scaler_B\.", "generator.scale_b."),
    (r"^bias_A\.(.*)$", r"bias.\1_a"),
    (r"^bias_B\.(.*)$", r"bias.\1_b"),
)
"""Their names to ours, applied in order."""


def _tensors(state: dict[str, Tensor], ours: Hypernetwork) -> dict[str, Tensor]:
    """Their tensors by our names, in our layout."""
    tensors = {}
    for theirs, tensor in state.items():
        name = theirs.replace("_orig_mod.", "")
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if name == "head.weight":  # [layers, width, .]; of several modules [layers, modules, width, that of the widest]
            by_module = tensor.unsqueeze(1) if tensor.dim() == 3 else tensor
            for (module, size), weight in zip(ours.modules_shapes.items(), by_module.unbind(1), strict=True):
                tensors[f"generator.heads.{module}"] = weight[..., : sum(size)]
        elif name.startswith("generator.scale_"):  # [1, layers, rank, 1]: their chunks come first
            tensors[name] = tensor.transpose(0, 1)
        elif re.search(r"row_mlps.*(up|down)\.weight", name):  # [layers, in, out], or [out, in] where shared
            tensors[name] = tensor if tensor.dim() == 3 else tensor.mT.unsqueeze(0)
        elif re.search(r"row_mlps.*(up|down)\.bias", name):  # [1, layers, 1, 1, out], or [out] where shared
            tensors[name] = tensor.reshape(-1, 1, tensor.shape[-1])
        elif ours.config.bias_rank or not name.startswith("bias."):
            tensors[name] = tensor
    return tensors


class _Record:
    """Stands for an object of their configuration classes: attributes and nothing else."""

    def __setstate__(self, values: dict[str, Any]) -> None:
        vars(self).update(values)


def _rebuild_tensor(storage: Tensor, offset: int, shape: Sequence[int], stride: Sequence[int], *_: object) -> Tensor:
    return storage.as_strided(shape, stride, offset)


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "LongStorage"): torch.int64,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("ctx_to_lora.modeling.hypernet", "HypernetConfig"): _Record,
    ("ctx_to_lora.modeling.aggregator", "AggregatorConfig"): _Record,
    ("ctx_to_lora.configs", "CtxEncoderArguments"): _Record,
    ("peft.tuners.lora.config", "LoraConfig"): _Record,
    ("peft.tuners.lora.config", "LoraRuntimeConfig"): _Record,
    ("peft.utils.peft_types", "PeftType"): str,
}
"""All that a checkpoint may name, and what we put in its place."""


class _Unpickler(pickle.Unpickler):
    """Reads `data.pkl` of an archive that `torch.save` wrote."""

    def __init__(self, archive: zipfile.ZipFile, path: Path):
        (pickled,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name))
        super().__init__(archive.open(pickled))
        self.archive, self.path, self.folder = archive, path, pickled.removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise UserError(
                f"{self.path}: refused: it names {module}.{name}, which no Doc-to-LoRA checkpoint needs and which "
                "could run code. Get the file from its authors; do not load this one with other tools either"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: tuple[str, torch.dtype, str, str, int]) -> Tensor:
        kind, dtype, key, _device, _numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"persistent id {kind!r}")
        return torch.frombuffer(bytearray(self.archive.read(f"{self.folder}data/{key}")), dtype=dtype)


def _read(path: Path) -> dict[str, Any]:
    """The checkpoint's dictionary."""
    try:
        with zipfile.ZipFile(path) as archive:
            state = _Unpickler(archive, path).load()
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # unpickling garbage raises almost anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: truncated, or not a file that torch.save wrote ({reason})") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a Doc-to-LoRA checkpoint (it holds a {type(state).__name__})")
    return state
