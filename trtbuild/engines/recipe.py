"""The recipe: everything a user asks for, as one checked object; TOML on disk, flags on the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import PrecisionName
from trtbuild.errors import Refused
from trtbuild.units import parse_bytes, parse_share
from trtbuild.workspace import check_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BuilderName = Literal["tensorrt-rtx", "tensorrt", "tensorrt-llm"]
KvCacheName = Literal["auto", "bf16", "fp16", "fp8"]


class Recipe(BaseModel):
    """Field names are the long flags of `trtbuild compile`, with underscores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    revision: str | None = None
    name: str | None = None
    precision: PrecisionName | None = None
    budget: int | None = Field(default=None, ge=1)
    max_loss: float | None = Field(default=None, gt=0, lt=10)
    kv_cache: KvCacheName = "auto"
    tp: int = Field(default=1, ge=1)
    pp: int = Field(default=1, ge=1)
    moe_tp: int | None = Field(default=None, ge=1)
    moe_ep: int | None = Field(default=None, ge=1)
    builder: BuilderName = "tensorrt-rtx"
    target: tuple[str, ...] = ()
    max_batch_size: int = Field(default=8, ge=1)
    max_input_len: int | None = Field(default=None, ge=1)
    max_seq_len: int | None = Field(default=None, ge=2)
    chunk_size: int | None = Field(default=None, ge=1)
    calib_data: Path | None = None
    lora: tuple[str, ...] = ()
    segment_layers: int | None = Field(default=None, ge=1)
    moe_form: Literal["auto", "conditional", "routed", "dense"] = "auto"
    embed_weights: bool = False
    plan_only: bool = False
    trtllm: dict[str, str | int | bool] = Field(default_factory=dict)

    @field_validator("target", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """As on the command line: sm89,sm120."""
        if not isinstance(value, str):
            return value
        parts = tuple(part.strip() for part in value.split(","))
        if not all(parts):
            raise ValueError("must be compute capabilities separated by commas, such as sm89,sm120")
        return parts

    @field_validator("budget", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        """As on the command line: 22GiB."""
        return parse_bytes(value) if isinstance(value, str) else value

    @field_validator("trtllm", mode="before")
    @classmethod
    def _flags(cls, value: Any) -> Any:
        """As on the command line: NAME=VALUE; true and false are a switch's."""
        if not isinstance(value, tuple):
            return value
        pairs = [str(text).partition("=") for text in value]
        if not all(name and sign for name, sign, _ in pairs):
            raise ValueError("must be NAME=VALUE, such as tokens_per_block=64")
        return {name.strip().replace("-", "_"): _from_text(text.strip()) for name, _, text in pairs}

    @field_validator("max_loss", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        """As on the command line: 0.5%."""
        return parse_share(value) if isinstance(value, str) else value

    @classmethod
    def read(cls, file: Path, **overrides: Any) -> Recipe:
        """A recipe file, with flags on top.

        A `model`, `calib_data` or `lora` that begins with ./ or ../ is relative to the file.
        """
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise Refused(f"recipe {file}: {error}") from error
        for key in ("model", "calib_data"):
            value = content.get(key)
            if isinstance(value, str) and value.startswith(("./", "../")):
                content[key] = str(file.parent / value)
        if isinstance(content.get("lora"), list):
            content["lora"] = [
                str(file.parent / value) if isinstance(value, str) and value.startswith(("./", "../")) else value
                for value in content["lora"]
            ]
        unknown = sorted(set(content) - set(cls.model_fields))
        if unknown or "model" not in content:
            problem = f"unknown key {unknown[0]!r}" if unknown else "no model"
            raise Refused(f"recipe {file}: {problem}; keys: {', '.join(cls.model_fields)}")
        if isinstance(content.get("trtllm"), dict) and overrides.get("trtllm"):
            given = cls.create(model="any", trtllm=overrides.pop("trtllm")).trtllm
            content["trtllm"] |= given
        return cls.create(**{**content, **overrides})

    @classmethod
    def create(cls, **fields: Any) -> Recipe:
        """Validate; raises `Refused` that lists every field that is wrong and what is allowed."""
        try:
            return cls(**fields)
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r})" for e in error.errors()]
            raise Refused("recipe: " + "; ".join(lines)) from error

    @property
    def layout(self) -> Layout:
        return Layout.resolve(self.tp, self.pp, self.moe_tp, self.moe_ep)

    @property
    def engine_name(self) -> str:
        """NAME of build/ and engines/: `--name`, or MODEL-PRECISION-tpN[-epN][-ppN][-trtllm].

        A recipe that leaves the precision to the checkpoint has one only after `Job.resolve`.
        """
        if self.name:
            return check_name(self.name)
        layout = self.layout
        directory = Path(self.model).expanduser()
        model = (directory.resolve() if directory.is_dir() else directory).name.lower()
        parts = [model, self.precision or "bf16", f"tp{layout.tp}"]
        parts += [f"ep{layout.moe_ep}"] if layout.moe_ep > 1 else []
        parts += [f"pp{layout.pp}"] if layout.pp > 1 else []
        parts += ["trtllm"] if self.builder == "tensorrt-llm" else []
        return check_name("-".join(parts))

    def command(self) -> str:
        """The `trtbuild compile` command line that asks for this recipe."""
        import shlex

        words = ["trtbuild", "compile", self.model]
        for field, info in type(self).model_fields.items():
            value = getattr(self, field)
            if field == "model" or value == info.get_default(call_default_factory=True):
                continue
            flag = "--" + field.replace("_", "-")
            if isinstance(value, bool):
                words.append(flag)
            elif field == "lora":
                words += [word for adapter in value for word in (flag, adapter)]
            elif field == "trtllm":
                words += [word for name, given in value.items() for word in (flag, f"{name}={_as_text(given)}")]
            else:
                words += [flag, ",".join(value) if isinstance(value, tuple) else str(value)]
        return shlex.join(words)


def _from_text(text: str) -> str | int | bool:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isdecimal() else text


def _as_text(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
