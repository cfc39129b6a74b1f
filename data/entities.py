"""Entities: which training pairs show the same object.

A survey sees the same few vehicles in frame after frame, so that a class holds far fewer objects than chips.
Pairs of one entity are held out together (`data.split.stratified_split`), and entities, not only classes, can be
drawn equally often.

Within a class, two EO chips whose correlation exceeds CORRELATION show the same entity, and so do chips that a
chain of such pairs connects (single linkage). A CSV with the columns chip and entity overrides this.
"""

import contextlib
import hashlib
import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.errors import DataError
from data.files import SUFFIXES, read_table
from data.lock import locked
from data.store import open_store, store_digest

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

COLUMNS = ("chip", "entity")  # of the CSV
NOTE = "chip is a file name without its extension, or class/name; entity is any text"
CORRELATION = 0.8  # of two chips' grey levels, above which they show the same entity
MAX_SIDE = 48  # px; larger chips are averaged over squares of pixels first
WORK = 2e11  # multiplications of a class, as pairs of its chips times dimensions, ...
LEAST = 40  # ... but never fewer dimensions than this
RESIDUAL = 0.5  # correlation assumed between the parts of two chips that lie outside these dimensions
MARGIN = 0.001  # below CORRELATION, for the rounding of the filter
ROWS, COLUMNS_AT_ONCE, PAIRS_AT_ONCE = 512, 2048, 2048  # of a block of pairs; it fits the cache of a processor
SAMPLE = 10_000  # chips that the dimensions are computed from
KEPT = 16  # files of entities that a folder holds
FORMAT = 1  # raise it when the same chips get other entities


def find_entities(pairs, folder, skip_bad=False, listed="", reading=()):
    """The entity of each training pair: found in the EO chips, or listed in a CSV.

    What was found is kept in `folder`, so that all stages have the same entities and only the first computes them.

    Args:
        pairs: `data.layouts.Pairs`, N of them.
        folder, skip_bad: of `data.store.open_store`, which decodes the EO chips. An unreadable chip is an entity
            of its own.
        listed: CSV with the columns chip (a file name without its extension, or class/name) and entity (any text;
            the same text in two classes means two entities); "" = none. Chips without a row keep the entity that
            was found.
        reading: (side, grey range) of `open_store`; empty = as it finds them.

    Returns:
        int32 [N], 0..E-1, in the order in which the entities first appear; each lies in one class.

    Raises:
        DataError: of `open_store` and `read_entities`.
    """
    if listed and not os.path.isfile(listed):
        raise DataError(f"ENTITIES {listed} is not a file; set it to a CSV with the columns {','.join(COLUMNS)}")
    rows = read_entities(listed, pairs) if listed else {}
    chips = open_store(pairs.eo, folder, skip_bad, *reading, report=False)
    entities = _kept(chips, pairs.labels, Path(folder))
    if rows:
        numbers = {key: len(pairs.labels) + number for number, key in enumerate(dict.fromkeys(rows.values()))}
        entities[list(rows)] = [numbers[key] for key in rows.values()]
    entities = _in_order(entities)
    source = f"; {listed} lists {len(rows)} of the pairs" if listed else ""
    print(f"{len(entities)} pairs show {entities.max() + 1} entities{source}")
    return entities


def read_entities(path, pairs):
    """{index of a pair: (label, entity)} of the rows of a CSV with the columns chip and entity.

    Raises:
        DataError: the file cannot be read or has not these columns; a row names no chip, chips of several classes,
            or a chip that another row names; or a row has no entity.
    """
    index_of, rows = _names(pairs), {}
    for line, name, entity in read_table(path, COLUMNS, "a list of entities", NOTE):
        where, (stem, suffix) = f"{path}, line {line}", os.path.splitext(name)
        chip = stem if suffix.lower() in SUFFIXES else name
        if chip not in index_of:
            example = f"{pairs.classes[0]}/{os.path.splitext(os.path.basename(pairs.eo[0]))[0]}"
            raise DataError(f"{where}: there is no training chip {name!r}; write names such as {example}")
        index = index_of[chip]
        if index < 0:
            raise DataError(f"{where}: several classes have a chip {name!r}; write <class>/{name}")
        if index in rows:
            raise DataError(f"{where}: {name} stands there twice; remove one row")
        if not entity:
            raise DataError(f"{where}: {name} has no entity; write one, or remove the row")
        rows[index] = (int(pairs.labels[index]), entity)
    return rows


def _names(pairs):
    """{name of a chip: index of its pair}; -1 for a name that several classes have."""
    index_of = {}
    for paths in (pairs.eo, pairs.sar):
        for index, (path, label) in enumerate(zip(paths, pairs.labels, strict=True)):
            stem = os.path.splitext(os.path.basename(path))[0]
            index_of[f"{pairs.classes[label]}/{stem}"] = index
            if index_of.setdefault(stem, index) != index:
                index_of[stem] = -1
    return index_of


def _in_order(keys):
    """Numbers int32 [N], 0, 1, ..., of keys [N] in the order in which they first appear."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int32)
    number[np.argsort(first)] = np.arange(len(first))
    return number[inverse]


def _kept(chips, labels, folder):
    """`discover(chips, labels)`, read from a file in `folder` where an earlier call has written it."""
    constants = (FORMAT, CORRELATION, MAX_SIDE, WORK, LEAST, RESIDUAL, MARGIN, SAMPLE)
    key = hashlib.blake2b(f"{store_digest(chips)}{constants}".encode() + labels.tobytes(), digest_size=16)
    path = folder / f"entities-{key.hexdigest()}.npy"
    if (entities := _load(path, labels.shape)) is not None:  # no lock, since the folder may be read-only
        return entities
    with locked(folder / "lock"):
        if (entities := _load(path, labels.shape)) is not None:  # another process may have made it in the meantime
            return entities
        entities, temporary = discover(chips, labels), path.with_suffix(".part")
        with open(temporary, "wb") as file:
            np.save(file, entities)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        others = sorted(folder.glob("entities-*.npy"), key=lambda p: (p != path, -p.stat().st_mtime))
        for old in others[KEPT:]:
            old.unlink(missing_ok=True)
    return entities


def _load(path, shape):
    """The entities in a file, int64 of that shape; None if there is none or it is damaged."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        entities = np.load(path)
        return entities if entities.shape == shape and entities.dtype == np.int64 else None


def discover(chips, labels, workers=0):
    """The entity of each chip; the same for any number of workers.

    A class with many chips is not compared in all pixels: principal components give an estimate of the correlation
    of each pair, and only the pairs above the threshold are compared in full. Few links are missed by it, none is
    added.

    Args:
        chips: uint8 [N, S, S]; labels: int64 [N].
        workers: threads; 0 = as many as there are cores.

    Returns:
        int64 [N]: for each chip the least index among the chips of its entity. A chip of one grey level is an
        entity of its own.
    """
    entities = np.arange(len(labels))
    with tqdm(total=len(labels), desc="entities", unit=" chips", disable=None) as bar, threadpool_limits(1):
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            links = _Links(_reduced(chips, members))
            links.find(workers or os.cpu_count(), bar)
            entities[members] = members[links.roots(np.arange(len(members)))]
    return entities


def _reduced(chips, members):
    """The chips at `members` (ascending int64 [n]) as uint8 [n, P], averaged to at most MAX_SIDE px a side."""
    side = chips.shape[1]
    factor = -(-side // MAX_SIDE)
    if members[-1] - members[0] + 1 == len(members):
        chips = chips[members[0] : members[-1] + 1]  # a view of the file
    else:
        chips = chips[members]
    if factor > 1:
        small = side // factor
        reduced = np.empty((len(members), small, small), np.uint8)
        for start in range(0, len(members), ROWS):
            block = chips[start : start + ROWS, : small * factor, : small * factor]
            means = block.reshape(-1, small, factor, small, factor).mean((2, 4))
            reduced[start : start + ROWS] = np.rint(means)
        chips = reduced
    return np.asarray(chips).reshape(len(members), -1)


class _Links:
    """Links between the chips of one class, and the sets that they connect (union-find).

    Args:
        chips: uint8 [n, P].
    """

    def __init__(self, chips):
        self.chips, self.parent, self.lock = chips, np.arange(len(chips)), threading.Lock()
        blocks = [chips[start : start + ROWS] for start in range(0, len(chips), ROWS)]
        self.mean = np.concatenate([block.mean(1, dtype=np.float64) for block in blocks]).astype(np.float32)
        # Of the grey levels around their mean; of a chip of one level it is 0, and it is never compared.
        self.norm = np.concatenate([block.std(1, dtype=np.float64) for block in blocks]) * chips.shape[1] ** 0.5
        self.norm = self.norm.astype(np.float32)

    def roots(self, chips):
        """The least index in the set of each chip, int64 [B]."""
        roots = self.parent[chips]
        while (higher := self.parent[roots] != roots).any():
            roots[higher] = self.parent[roots[higher]]
        return roots

    def find(self, workers, bar):
        """Link all pairs of chips whose correlation exceeds CORRELATION; `bar` counts the chips."""
        varied = np.flatnonzero(self.norm > 0)
        vectors = _vectors(self, varied)
        # Two vectors of correlation r are sqrt(2 - 2 r) apart, so along the first axis as well: sorted by it, most
        # blocks that are far from the diagonal hold no links.
        order = np.argsort(vectors[:, 0], kind="stable")
        varied, vectors = varied[order], vectors[order]
        reach = (2 - 2 * (CORRELATION - MARGIN)) ** 0.5
        ends = np.searchsorted(vectors[:, 0], vectors[:, 0] + reach, side="right")

        def link_rows(start):
            stop = min(start + ROWS, len(varied))
            for first in range(start, ends[stop - 1], COLUMNS_AT_ONCE):
                scores = vectors[start:stop] @ vectors[first : first + COLUMNS_AT_ONCE].T
                self._link(scores, varied[start:stop], varied[first : first + COLUMNS_AT_ONCE])
            return stop - start

        with ThreadPoolExecutor(workers) as pool:
            for done in pool.map(link_rows, range(0, len(varied), ROWS)):
                bar.update(done)
        bar.update(len(self.chips) - len(varied))

    def _link(self, scores, rows, columns):
        """Link those pairs of a block whose estimated correlation `scores`, [rows, columns], and whose true one exceed
        CORRELATION."""
        if scores.max() <= CORRELATION - MARGIN:
            return
        above = np.flatnonzero(scores > CORRELATION - MARGIN)
        above = above[np.argsort(-scores.ravel()[above], kind="stable")]  # the nearest first
        row, column = np.divmod(above, len(columns))
        one, two = rows[row], columns[column]
        for attempt in itertools.count():
            of_two = self.roots(two)
            apart = self.roots(one) != of_two
            if not apart.any():
                return
            one, two, of_two = one[apart], two[apart], of_two[apart]
            # The nearest pair of each set connects most of it to another, whose other pairs need no comparison then.
            tried = np.unique(of_two, return_index=True)[1] if attempt < 2 else np.arange(min(len(one), PAIRS_AT_ONCE))
            for start in range(0, len(tried), PAIRS_AT_ONCE):
                self._compare(one[tried[start : start + PAIRS_AT_ONCE]], two[tried[start : start + PAIRS_AT_ONCE]])
            one, two = np.delete(one, tried), np.delete(two, tried)

    def _compare(self, one, two):
        """Link those pairs of chips, int64 [B] each, whose correlation exceeds CORRELATION."""
        linked = np.matmul(self.centred(one)[:, None], self.centred(two)[:, :, None]).ravel() > CORRELATION
        with self.lock:
            for pair in zip(one[linked].tolist(), two[linked].tolist(), strict=True):
                low, high = sorted(map(self._root, pair))
                self.parent[high] = low

    def _root(self, chip):
        parent = self.parent
        while (above := int(parent[chip])) != chip:
            parent[chip] = parent[above]  # halves the path for the next search
            chip = above
        return chip

    def centred(self, chips):
        """Vectors float32 [B, P] of mean 0 and norm 1 of chips that are not of one level."""
        return (self.chips[chips] - self.mean[chips, None]) / self.norm[chips, None]


def _vectors(links, varied):
    """Vectors float32 [n, D] of chips whose products estimate the correlations of the chips.

    D - 1 principal components, and the length of what is outside them, as if these parts of two chips had the
    correlation RESIDUAL. In a small class all pixels, whose products are the correlations.
    """
    pixels = links.chips.shape[1]
    dimensions = max(LEAST, int(WORK / max(len(varied), 1) ** 2))
    if dimensions >= pixels:
        return links.centred(varied)
    sample = links.centred(varied[:: -(-len(varied) // SAMPLE)]).astype(np.float64)
    _, axes = np.linalg.eigh(sample.T @ sample)  # in ascending order of the variance
    axes = axes[:, :-dimensions:-1].astype(np.float32)
    vectors = np.empty((len(varied), dimensions), np.float32)
    for start in range(0, len(varied), ROWS):
        inside = links.centred(varied[start : start + ROWS]) @ axes
        outside = (1 - np.square(inside).sum(1)).clip(0)
        vectors[start : start + ROWS] = np.column_stack((inside, (RESIDUAL * outside) ** 0.5))
    return vectors
