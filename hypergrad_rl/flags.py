"""Flags of the command line that several commands share: every hyper-parameter is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypedDict, get_type_hints

from tyro.conf import OmitArgPrefixes, arg

from hypergrad_rl.config import BLPOConfig, PPOConfig
from hypergrad_rl.meanings import MEANINGS

Algo = Literal["ppo", "nested", "blpo"]
Style = Literal["tuned", "paper", "fast"]
#: Words of the command line in the place of Python's.
_WORDS: dict[str, tuple[Any, dict[Any, Any]]] = {
    "compile": (Literal["auto", "true", "false"], {"true": True, "false": False}),
    "correction_bound": (float | Literal["none"], {"none": None}),
}
_KINDS = {**get_type_hints(PPOConfig), **get_type_hints(BLPOConfig)}
_KINDS |= {name: kind for name, (kind, _) in _WORDS.items()}
#: Every hyper-parameter as a flag; a command has those that were given, which override the preset.
_Parameters: Any = TypedDict(  # type: ignore[misc]  # made from what the configurations have
    "_Parameters",
    {
        name: Annotated[
            kind, arg(help=MEANINGS[name], help_behavior_hint="(default: the task's preset)")
        ]
        for name, kind in _KINDS.items()
        if name not in ("env", "seed")  # each command has these itself
    },
    total=False,
)
HyperParameters: TypeAlias = OmitArgPrefixes[_Parameters]


def settings(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters that were given, as the configurations have them."""
    words = {name: words for name, (_, words) in _WORDS.items()}
    return {name: words.get(name, {}).get(x, x) for name, x in parameters.items()}
