"""Find a model by path or name, and fingerprint its files."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from autoquant_ray.config.values import place_problem
from autoquant_ray.errors import ModelError, one_line
from autoquant_ray.models.gguf_config import apply_query_scale, apply_rotary, read_facts
from autoquant_ray.models.gguf_parameters import apply_parameters, require_single_file
from autoquant_ray.models.layers import layer_configs
from autoquant_ray.runs.hashing import fingerprint_files
from autoquant_ray.wording import few, shown

TOKENIZER_FILES: tuple[str, ...] = (
    "tokenizer*.json",
    "tokenizer.model",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Names of files in a model's folder that may belong to its tokenizer."""

_HUB_TIMEOUT_S = 10.0

_BOUND = re.compile(r"^transformers\b[^;]*?<\s*(\d+)\.(\d+)")

CHAT_FILES = ("chat_template*", "*preprocessor_config.json", "processor_config.json")
"""Names of files that decide which tokens and tensors a chat or an image becomes."""


MODEL_FILES = ("config.json", "hf_quant_config.json", "*.safetensors", "*.py")
"""Names of files that decide what a model computes."""


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """Where a model is.

    Attributes:
        name: As the user gave it, for messages and reports.
        path: Folder or hub id, as ``from_pretrained`` takes it.
        gguf_file: File name inside the folder where the weights are GGUF.
        trust_remote_code: Whether code from the checkpoint may run.
    """

    name: str
    path: str
    gguf_file: str | None = None
    trust_remote_code: bool = False

    @property
    def weights_folder(self) -> Path | None:
        """Folder of the safetensors files; None for GGUF and for a hub id."""
        folder = Path(self.path)
        return folder if self.gguf_file is None and folder.is_dir() else None

    @property
    def load_arguments(self) -> dict[str, Any]:
        """Arguments common to all ``from_pretrained`` calls."""
        arguments: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        return arguments | ({"gguf_file": self.gguf_file} if self.gguf_file else {})


def find_model(name: str, *, trust_remote_code: bool = False) -> ModelRef:
    """Resolve a folder, a GGUF file or a hub id.

    Raises:
        ModelError: A local path that does not exist or holds no model.
    """
    if (problem := place_problem(name)) is not None:
        raise ModelError(f"model: {problem}")
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"model {name} is a file but not .gguf; give its folder")
        return ModelRef(
            name=name,
            path=str(path.absolute().parent),
            gguf_file=path.name,
            trust_remote_code=trust_remote_code,
        )
    if path.is_dir():
        gguf_file = None
        if not (path / "config.json").exists():
            gguf_file = _only_gguf(name, path)
        return ModelRef(
            name=name,
            path=str(path.absolute()),
            gguf_file=gguf_file,
            trust_remote_code=trust_remote_code,
        )
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise ModelError(f"model {name} does not exist; give a folder, a GGUF file or a hub id")
    return ModelRef(name=name, path=name, trust_remote_code=trust_remote_code)


def _only_gguf(name: str, folder: Path) -> str:
    """The GGUF file of a folder without ``config.json``.

    Raises:
        ModelError: It holds none, or several.
    """
    files = sorted(file.name for file in folder.iterdir() if file.suffix.lower() == ".gguf")
    if files[1:]:
        raise ModelError(f"model folder {name} holds several GGUF files: {few(files, 3)}; give one")
    if files:
        return files[0]
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"model folder {name} holds an adapter, not a model; merge it into its model first "
            "(peft: merge_and_unload), and save that"
        )
    raise ModelError(
        f"model folder {name} holds no config.json and no GGUF file; give the folder of a model"
    )


def require_mappable(ref: ModelRef) -> None:
    """Check that the weights are in files that can be memory-mapped, as offloading needs.

    Raises:
        ModelError: They are in GGUF.
    """
    if ref.gguf_file is not None:
        raise ModelError(
            f"model {ref.name} is a GGUF file, but offload needs safetensors; convert it, or give "
            "`placement` resident"
        )


def fingerprint_model(ref: ModelRef) -> str:
    """Hash the config, the weight files and the tokenizer's files.

    A hub id is identified by its name and, where known, its revision.
    """
    folder = Path(ref.path)
    if not folder.is_dir():
        _load_config(ref)
        return f"{ref.path}@{_revision(ref.path)}"
    patterns = TOKENIZER_FILES
    patterns += (ref.gguf_file,) if ref.gguf_file else MODEL_FILES
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    return fingerprint_files(sorted(files))


def _revision(hub_id: str) -> str | None:
    """The commit of a hub model whose config was just loaded: the folder of the cache it is in."""
    from transformers.utils import cached_file

    folder = Path(cached_file(hub_id, "config.json") or "").parent.name
    return folder if re.fullmatch("[0-9a-f]{40}", folder) else None


def fingerprint_chats(ref: ModelRef) -> str:
    """Hash a model's chat template and processor, which samples of plain text do not depend on."""
    files = {file for pattern in CHAT_FILES for file in Path(ref.path).glob(pattern)}
    return fingerprint_files(sorted(file for file in files if file.is_file()))


def _stated(ref: ModelRef) -> dict[str, Any]:
    """Content of the config, where it can be read at all."""
    import transformers

    try:
        content: dict[str, Any] = transformers.PreTrainedConfig.get_config_dict(ref.path)[0]
    except Exception:  # noqa: BLE001 - only asked in order to explain an error
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def hold_warnings() -> Iterator[None]:
    """Hold what transformers logs; pass it on at the end, or drop it where an error ends this.

    A model that is refused is refused in a single line; a warning before it would be a second.
    """
    import transformers  # noqa: F401 - it sets its handlers up while it is imported

    held: list[tuple[logging.Handler, logging.LogRecord]] = []

    def holding(handler: logging.Handler) -> Callable[[logging.LogRecord], bool]:
        def hold(record: logging.LogRecord) -> bool:
            if record.name.split(".")[0] != "transformers":
                return True
            held.append((handler, record))
            return False

        return hold

    filters = {handler: holding(handler) for handler in _handlers("transformers")}
    for handler, hold in filters.items():
        handler.addFilter(hold)
    try:
        yield
    finally:
        for handler, hold in filters.items():
            handler.removeFilter(hold)
    for handler, record in held:
        handler.handle(record)


def _handlers(name: str) -> Iterator[logging.Handler]:
    """All handlers that a record of a logger reaches.

    transformers passes its records on to the root's handlers where the environment says ``CI``.
    """
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None:
        yield from logger.handlers
        logger = logger.parent if logger.propagate else None


@hold_warnings()
def _load_config(ref: ModelRef) -> Any:
    import transformers

    if not Path(ref.path).is_dir():
        _require_hub(ref.path)
    try:
        config = transformers.AutoConfig.from_pretrained(ref.path, **ref.load_arguments)
        require_sizes(config)
        _require_type(config)
        _require_classes(config)
    except ModelError as error:
        raise ModelError(f"config of model {ref.name}: {error}") from None
    except Exception as error:  # noqa: BLE001 - whatever a foreign config makes transformers raise
        needs_code = "trust_remote_code" in str(error)
        hint = " (its own code needs `trust_remote_code`)" if needs_code else ""
        raise ModelError(
            f"config of model {ref.name}: {_why_unreadable(error, _stated(ref), ref)}{hint}"
        ) from None
    if ref.gguf_file is not None:
        facts = read_facts(Path(ref.path) / ref.gguf_file)
        require_single_file(facts.split)
        apply_rotary(config, facts.rotary)
        apply_parameters(config, facts.parameters)
        apply_query_scale(config)
    return config


def _require_hub(hub_id: str) -> None:
    """Check that a model that is not in the hub's cache can be asked for, with a single question.

    transformers asks a hub that does not answer again and again, for a minute.

    Raises:
        ModelError: The hub does not answer, or may not be asked.
    """
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id, "config.json", cache_dir=constants.HF_HUB_CACHE)
    if isinstance(cached, str):
        return
    here = f"model {hub_id} is no folder here and not in the hub's cache"
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{here}, and HF_HUB_OFFLINE forbids to ask the hub; give a folder")
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_S)
    # Its client is httpx, of huggingface_hub 2 httpx2: each raises errors of its own.
    except Exception as error:  # noqa: BLE001
        raise ModelError(
            f"{here}, and the hub {constants.ENDPOINT} does not answer ({one_line(error)}); give a "
            "folder, or check the network and HF_ENDPOINT"
        ) from None


_SIZES = {
    "num_hidden_layers": (1, 10_000),
    "num_attention_heads": (1, 100_000),
    "hidden_size": (1, 10_000_000),
    "vocab_size": (1, 100_000_000),
    "num_key_value_heads": (0, 100_000),
    "intermediate_size": (0, 100_000_000),
    "head_dim": (0, 100_000),
}
"""Size -> the least and the most that a model has; 0 where some family has no such part."""


def require_sizes(config: Any) -> None:
    """Check the sizes that a config of a language model states, before anything is built of them.

    Raises:
        ModelError: One is no whole number, below 1, or larger than any model's.
    """
    parts = {id(c): c for c in (config, config.get_text_config())}.values()
    for stated in itertools.chain.from_iterable(map(layer_configs, parts)):
        for name, (least, most) in _SIZES.items():
            value = getattr(stated, name, None)
            if value is None or isinstance(value, list | tuple):  # of each layer
                continue
            is_number = isinstance(value, int) and not isinstance(value, bool)
            if not is_number or not least <= value <= most:
                raise ModelError(f"{name} {shown(value)} is no number from {least} to {most:,}")


def _require_type(config: Any) -> None:
    """Check that the type of the weights that a config states is one.

    Raises:
        ModelError: It is not.
    """
    import torch

    stated = getattr(config, "dtype", None)
    kind = getattr(torch, stated, None) if isinstance(stated, str) else stated
    if stated is not None and not isinstance(kind, torch.dtype):
        raise ModelError(f"dtype {shown(stated)} is no type of torch, such as bfloat16")


def _require_classes(config: Any) -> None:
    """Check that a config names its model's classes in a list; transformers 5.18 takes anything.

    Raises:
        ModelError: It does not.
    """
    names = getattr(config, "architectures", None)
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if names is not None and not is_list:
        raise ModelError(f"architectures {shown(names)} is no list of names of classes")


def _why_unreadable(error: Exception, config: Mapping[str, Any], ref: ModelRef) -> str:
    """Why a config could not be read, in a line, and what helps.

    Args:
        error: What transformers raised.
        config: Content of the config, as far as it could be read.
        ref: The model.
    """
    import transformers

    types = _types_in(config)
    unknown = next((t for t in types if t not in transformers.CONFIG_MAPPING), None)
    is_about_it = isinstance(error, KeyError) or f"`{unknown}`" in str(error)
    if unknown is None or not is_about_it:
        is_plain = isinstance(error, OSError | ValueError | ImportError)
        kind = "" if is_plain else f"{type(error).__name__}: "
        look = "look at config.json" if ref.gguf_file is None else "get the GGUF file anew, whole"
        return f"it cannot be read ({kind}{one_line(error, limit=200)}); {look}"
    installed = transformers.__version__
    return (
        f"transformers {installed} does not know the type {unknown!r}"
        f"{upgrade_advice(installed, _requirements())}"
    )


def _types_in(config: Mapping[str, Any]) -> list[str]:
    """The model's type and those of its parts."""
    parts = [part for part in config.values() if isinstance(part, Mapping)]
    stated = config.get("model_type")
    return [
        *([stated] if isinstance(stated, str) else []),
        *(t for p in parts for t in _types_in(p)),
    ]


def upgrade_advice(installed: str, requirements: Sequence[str]) -> str:
    """What to do about a type that transformers does not know, within this package's bounds.

    transformers itself advises releases that ModelOpt may not work with.

    Args:
        installed: Version of transformers.
        requirements: Of this package, as its metadata states them.
    """
    bounds = [match for line in requirements if (match := _BOUND.match(line))]
    if not bounds:
        return "; if it is newer than that, install a newer transformers that ModelOpt allows"
    major, minor = (int(part) for part in bounds[0].groups())
    release = tuple(int(part) for part in re.findall(r"\d+", installed)[:2])
    if release < (major, minor - 1):
        return (
            "; if it is newer than that: pip install --upgrade "
            f"'transformers<{major}.{minor}', the newest that ModelOpt allows"
        )
    return (
        f", and ModelOpt allows none from {major}.{minor} on; if the type is newer, its own code "
        "can be run with `trust_remote_code`, where the checkpoint brings it"
    )


def _requirements() -> list[str]:
    try:
        return metadata.requires("autoquant-ray") or []
    except metadata.PackageNotFoundError:  # run from a folder
        return []
