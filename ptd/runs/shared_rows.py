"""Tokenise rows on rank 0, and give them to all ranks: as maps of one copy per node, or in the memory of every rank.

Rank 0 looks for the rows in its cache folder (`ptd.data.cache`), and tokenises them into it if they are missing. A node
that does not see this folder receives the files once and stores them in its own cache folder. Only rank 0 reads the
rows, so all nodes have the same tokens, and the other nodes need neither the data nor the time to tokenise it. Ranks
that cannot map the files get the rows in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ptd.config import DataConfig
from ptd.data.cache import BLOCK_BYTES, CacheError, Damaged, RowsCache, default_folder
from ptd.data.collecting import Columns, InMemory
from ptd.distributed.ranks import Ranks
from ptd.distributed.rendezvous import ranks_as_text
from ptd.files import as_path
from ptd.types import Examples, Reporter

ADVICE = "set data.cache to a folder on a disk with free space that you may write to, or to none"


@dataclass(frozen=True)
class Tokenising:
    """How rank 0 makes the examples. ``make`` stores the arrays in the given columns; ``identify`` returns the key.

    ``identify`` raises `CacheError` if there is no key.
    """

    make: Callable[[Columns], Examples]
    identify: Callable[[], str]


def cache_of(config: DataConfig) -> RowsCache | None:
    """Return the cache that ``data.cache`` names; None if it is ``none``."""
    if config.cache == "none":
        return None
    folder = default_folder() if config.cache is None else as_path(config.cache)
    return RowsCache(folder, config.cache_gb * 1e9)


def share_examples(job: Tokenising, cache: RowsCache | None, ranks: Ranks, reporter: Reporter) -> Examples:
    """Return the examples on every rank; without a cache, in the memory of each. All ranks call this together.

    Raises the `UserError` of ``job.make`` on every rank. If a cache folder cannot be used, a note gives the reason.
    """
    if cache is None:
        return ranks.on_main(lambda: job.make(InMemory), long=True)
    made: list[Examples] = []

    def make() -> str | None:
        examples, key = _make(job, cache, reporter)
        made.append(examples)
        return key

    key = ranks.on_main(make, long=True)
    if ranks.world_size == 1:
        return made[0]
    own = made[0] if ranks.is_main else None
    reason = ""
    if key is not None:
        reason = ranks.gather(_copy_to_nodes(cache, key, ranks, reporter))[ranks.first_of_node]
        if not ranks.is_main and not reason:  # the first rank of the node has compared the content
            own, reason = _mapped(cache, key)
    reasons = ranks.gather(reason if own is None else None)
    lacking = [rank for rank, given in enumerate(reasons) if given is not None]
    if lacking and key is not None:
        reporter.note(
            f"data.cache: {ranks_as_text(lacking, 'rank')} cannot map the tokenised rows ({reasons[lacking[0]]}) and "
            f"will hold them in memory; {ADVICE}"
        )
    received = ranks.on_main(lambda: made[0]) if lacking else None
    examples = received if own is None else own
    assert examples is not None
    return examples


def _make(job: Tokenising, cache: RowsCache, reporter: Reporter) -> tuple[Examples, str | None]:
    """Return the examples and their key in the cache; the key is None if the cache cannot hold them."""
    try:
        key = job.identify()
        found = _found(cache, key, reporter)
        if found is None:
            with cache.write(key) as draft:
                draft.publish(job.make(draft))
            found = cache.read(key, verify=False)
        cache.trim(keep=key)
        if found is None:
            raise CacheError(f"{cache.folder / key} was removed")
        return found, key
    except (CacheError, Damaged) as error:
        reporter.note(
            f"data.cache: {cache.folder} cannot hold the tokenised rows ({error}), so every rank holds them in memory, "
            f"and the next start tokenises them again; {ADVICE}"
        )
        return job.make(InMemory), None


def _found(cache: RowsCache, key: str, reporter: Reporter) -> Examples | None:
    """Return an entry after comparing all of its content with its digests; remove it if it is damaged."""
    try:
        return cache.read(key, verify=True)
    except Damaged as error:
        reporter.note(f"data.cache: the tokenised rows are damaged ({error}); tokenising them again")
        cache.remove(key)
        return None


def _mapped(cache: RowsCache, key: str) -> tuple[Examples | None, str]:
    """Return the examples of an entry, or None and the reason why they cannot be mapped."""
    try:
        return cache.read(key, verify=False), f"{cache.folder / key} does not exist there"
    except (CacheError, Damaged) as error:
        return None, str(error)


def _copy_to_nodes(cache: RowsCache, key: str, ranks: Ranks, reporter: Reporter) -> str:
    """Copy the entry to the cache folder of every node that lacks it. All ranks call this together.

    Return why this rank, the first of its node, could not store it, or an empty string.
    """
    lacks, reason = False, ""
    if ranks.rank == ranks.first_of_node and not ranks.is_main:
        try:
            lacks = _found(cache, key, reporter) is None
        except CacheError as error:
            reason = str(error)
    if not ranks.any(lacks):
        return reason
    manifest = ranks.on_main(lambda: cache.manifest(key))
    assert manifest is not None
    blocks = _sent(cache, key, manifest, ranks)
    try:
        if lacks:
            with cache.write(key) as draft:
                draft.receive(manifest, blocks)
            cache.trim(keep=key)
    except CacheError as error:
        reason = str(error)
    for _ in blocks:  # a rank that stores none, or no more, still takes part in sending them
        pass
    return reason


def _sent(cache: RowsCache, key: str, manifest: dict[str, Any], ranks: Ranks) -> Iterator[tuple[str, np.ndarray]]:
    """Send the entry from rank 0 to the nodes; yield the name of each array with each block of its bytes, uint8."""
    for name, facts in manifest["arrays"].items():
        size = facts["length"] * np.dtype(facts["dtype"]).itemsize
        own = cache.blocks(key, name) if ranks.is_main else None
        for begin in range(0, size, BLOCK_BYTES):
            block = np.empty(min(BLOCK_BYTES, size - begin), dtype=np.uint8) if own is None else next(own)
            ranks.to_nodes(torch.from_numpy(block))
            yield name, block
