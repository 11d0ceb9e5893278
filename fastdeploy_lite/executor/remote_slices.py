"""Slices of steps on their way to ranks on other hosts, of which one samples.

What does not change between the steps of a sequence is sent when its slot is fresh; later steps
bring the blocks and tokens that are new. A custom logits processor may remember what it has seen,
so it, too, is sent once and lives where it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastdeploy_lite.request.step import LogitsProcessor, SamplerParams, SequenceSlice

_UNCHANGED = SamplerParams()


class UnsendableError(ValueError):
    """A custom logits processor cannot be pickled."""


@dataclass(slots=True)
class Parcel:
    """The slices of one step.

    Attributes:
        slices: what is new of them.
        processors: pickled logits processors by slot, of fresh slots that have some.
    """

    slices: list[SequenceSlice]
    processors: dict[int, bytes] = field(default_factory=dict)


class SliceSender:
    """Packs the slices of steps; remembers of every slot what has been sent.

    Args:
        dumps: pickles functions, also those that have no name in a module.
    """

    def __init__(self, dumps: Callable[[Any], bytes]) -> None:
        self._dumps = dumps
        self._sent: dict[int, tuple[int, int]] = {}

    def pack(self, slices: Sequence[SequenceSlice]) -> Parcel:
        """Return what to send.

        Raises:
            UnsendableError: nothing has been packed.
        """
        processors = {
            part.slot: self._pickled(part)
            for part in slices
            if part.fresh and part.logits_processors
        }
        news = [self._news(part) for part in slices]
        for part in slices:
            self._sent[part.slot] = (len(part.block_table), len(part.output_token_ids))
        return Parcel(news, processors)

    def _pickled(self, part: SequenceSlice) -> bytes:
        try:
            return self._dumps(part.logits_processors)
        except Exception as error:  # whatever a user's class raises
            raise UnsendableError(
                f"request {part.request_id}: its logits processor cannot be sent to the rank that"
                f" calls it: {type(error).__name__}: {error}"
            ) from error

    def _news(self, part: SequenceSlice) -> SequenceSlice:
        # Ranks that do not sample miss what it depends on, and all must gather alike.
        part = replace(part, known_candidates=part.candidates)
        if part.fresh:
            return replace(part, logits_processors=None)
        blocks, tokens = self._sent[part.slot]
        return replace(
            part,
            block_table=list(part.block_table[blocks:]),
            output_token_ids=list(part.output_token_ids[tokens:]),
            prompt_token_ids=(),
            sampling=_UNCHANGED,
            logits_processors=None,
        )


@dataclass(slots=True)
class _Known:
    """What was sent of a sequence; the lists grow in place."""

    block_table: list[int]
    output_token_ids: list[int]
    prompt_token_ids: Sequence[int]
    sampling: SamplerParams
    logits_processors: Sequence[LogitsProcessor] | None


class SliceKeeper:
    """The other end of `SliceSender`.

    Args:
        samples: whether this rank calls logits processors.
        loads: undoes `SliceSender`'s `dumps`.
    """

    def __init__(self, samples: bool, loads: Callable[[bytes], Any]) -> None:
        self._samples = samples
        self._loads = loads
        self._known: dict[int, _Known] = {}

    def unpack(self, parcel: Parcel) -> list[SequenceSlice]:
        """Return the slices as they were before they were packed."""
        return [self._whole(part, parcel) for part in parcel.slices]

    def _whole(self, part: SequenceSlice, parcel: Parcel) -> SequenceSlice:
        if part.fresh:
            raw = parcel.processors.get(part.slot) if self._samples else None
            known = self._known[part.slot] = _Known(
                list(part.block_table),
                list(part.output_token_ids),
                part.prompt_token_ids,
                part.sampling,
                None if raw is None else self._loads(raw),
            )
        else:
            known = self._known[part.slot]
            known.block_table += part.block_table
            known.output_token_ids += part.output_token_ids
        return replace(part, **{name: getattr(known, name) for name in _Known.__slots__})
