"""What `switchkd data check` says of a training set: counts by source, what is left out, and lengths in tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..data.check import FIRST, NOT_COUNTED, DataCheck, percent
from ..data.sources import OTHER, SOURCES

BINS = 16
BAR = 40  # characters of the longest one


def report(check: DataCheck, max_length: int | None) -> dict[str, Any]:
    """Everything as plain values, as `--json` prints them."""
    counts = np.bincount(check.source_N, minlength=len(SOURCES)).tolist()
    examples: dict[str, list[str]] = {}
    for row in check.broken.values():
        examples.setdefault(row.reason, []).append(row.detail if row.id is None else f"{row.id}: {row.detail}")
    return {
        "records": len(check.records),
        "trained_on": len(check.records) - len(check.broken),
        "left_out": check.by_reason,
        "left_out_share": check.share,
        "examples": {reason: details[:FIRST] for reason, details in examples.items()},
        "pictures": len(check.pictures),
        "records_with_picture": int((check.picture_N >= 0).sum()),
        "sources": [
            {
                "source": source.name,
                "records": count,
                "table_1_thousands": source.table_thousands,
                "told_by": source.told_by,
            }
            for source, count in zip(SOURCES, counts, strict=True)
        ],
        "tokens": _tokens(check, max_length),
    }


def _tokens(check: DataCheck, max_length: int | None) -> dict[str, Any] | None:
    good_M = check.good_M
    tokens_M = check.tokens_N[good_M]
    if not len(tokens_M) or bool((tokens_M == NOT_COUNTED).any()):
        return None
    most = max_length or int(tokens_M.max())
    width = max(1, -(-most // BINS))
    counts = np.bincount(np.minimum((tokens_M - 1) // width, BINS), minlength=BINS + 1).tolist()
    bins = [
        {"from": number * width + 1, "to": min((number + 1) * width, most), "records": count}
        for number, count in enumerate(counts[:BINS])
        if number * width < most
    ]
    if max_length is not None:
        over = int((tokens_M > max_length).sum())
        # Where the bins end behind the longest length, its own bin holds some of those that are over.
        bins[-1]["records"] += counts[BINS] - over if len(bins) == BINS else 0
        bins.append({"from": max_length + 1, "to": None, "records": over})
    return {
        "mean": float(tokens_M.mean()),
        "median": float(np.median(tokens_M)),
        "longest": int(tokens_M.max()),
        "all": int(tokens_M.sum()),
        "supervised": int(check.kept_N[good_M].sum()),
        "max_length": max_length,
        "truncated": 0 if max_length is None else int((tokens_M > max_length).sum()),
        "histogram": bins,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same as text."""
    return [
        f"{found['records']:,} records, {found['records_with_picture']:,} with one of {found['pictures']:,} pictures: "
        f"{found['trained_on']:,} can be trained on, {sum(found['left_out'].values()):,} are left out "
        f"({percent(found['left_out_share'])})",
        "",
        *_source_lines(found["sources"]),
        *_broken_lines(found),
        *_token_lines(found["tokens"]),
    ]


def _source_lines(sources: list[dict[str, Any]]) -> list[str]:
    rows = [f"{'source':<14} {'records':>10} {'paper, table 1':>15}   told by"]
    for row in sources:
        paper = "" if row["table_1_thousands"] is None else f"{row['table_1_thousands']},000"
        if row["records"] or row["source"] != OTHER.name:
            rows.append(f"{row['source']:<14} {row['records']:>10,} {paper:>15}   {row['told_by']}")
    return rows


def _broken_lines(found: dict[str, Any]) -> list[str]:
    if not found["left_out"]:
        return []
    rows = ["", f"{'left out':<34} {'records':>8}   such as"]
    for reason, count in found["left_out"].items():
        first, *more = found["examples"][reason]
        rows.append(f"{reason:<34} {count:>8,}   {first}")
        rows += [f"{'':<34} {'':>8}   {detail}" for detail in more]
    return rows


def _token_lines(tokens: dict[str, Any] | None) -> list[str]:
    if tokens is None:
        return []
    rows = [
        "",
        f"tokens of a conversation, with its picture's: mean {tokens['mean']:,.0f}, median {tokens['median']:,.0f}, "
        f"longest {tokens['longest']:,}; {tokens['all']:,} in all, of them supervised {tokens['supervised']:,}",
    ]
    most = max(row["records"] for row in tokens["histogram"])
    for row in tokens["histogram"]:
        bar = "█" * round(BAR * row["records"] / most)
        until = "and more" if row["to"] is None else f"– {row['to']:,}"
        rows.append(f"{row['from']:>8,} {until:<9} {row['records']:>10,} {bar}".rstrip())
    if tokens["max_length"] is not None:
        rows.append(f"{tokens['truncated']:,} conversations are longer than max_length and lose their end")
    return rows
