"""What a study's report begins with: the question, the claims with their verdicts, figures, comparisons, the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsekit.reports.blocks import Block, Cell, Figure, Figures, Fold, Section, Table, Text, number, short
from sparsekit.reports.study_summary import ClaimVerdict, StudySummary

SEED = "seed"


def study_sections(study: StudySummary) -> list[Section]:
    """The study's own sections, which stand before those of its runs."""
    asked: list[Block] = [Text(study.question, "lead"), Text(study.source and f"Source: {study.source}.", "remark")]
    if study.claims:
        asked += [_claims(study.claims), *_published(study.claims)]
    asked += [Text(remark, "remark") for remark in study.remarks]
    found = [Section("claims", "Question and claims", [b for b in asked if not isinstance(b, Text) or b.text])]
    if study.figures:
        found.append(Section("figures", "Figures", [Figures([Figure({"": plot}) for plot in study.figures])]))
    tables: list[Block] = []
    if study.comparisons:
        tables.append(rows_table("Each pair of values, seeds paired, with 95% intervals", study.comparisons))
    if study.plan:
        tables.append(Fold("The plan, run by run", [rows_table("Planned runs", study.plan)]))
    return [*found, *([Section("comparisons", "Comparisons", tables)] if tables else [])]


def groups_of_study(study: StudySummary, runs: Sequence[str]) -> tuple[list[str], list[str]]:
    """By runs' folder names, their labels and their variants: what they are on each axis, with the seed and without."""
    labels, groups = [], []
    for run in runs:
        axes = study.labels.get(run, {})
        variant = ", ".join(f"{axis} {value}" for axis, value in axes.items() if axis != SEED)
        seed = f"seed {axes[SEED]}" if SEED in axes else ""
        labels.append(", ".join(part for part in (variant, seed) if part) or run)
        groups.append(variant or run)
    return labels, groups


def rows_table(caption: str, rows: Sequence[Mapping[str, str | int | float | None]]) -> Table:
    """Rows by column name as a table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    body = [[_cell(row.get(name)) for name in names] for row in rows]
    return Table(caption, [Cell(name.replace("_", " ")) for name in names], body)


def _cell(value: str | int | float | None) -> Cell:
    if value is None or isinstance(value, str):
        return Cell("–" if value is None else value, mark=_mark(value or ""))
    return number(value)


def _claims(claims: Sequence[ClaimVerdict]) -> Table:
    head = [
        Cell(name)
        for name in ("claim", "verdict", "difference, last value – first", "found", "published", "step by step")
    ]
    rows = []
    for claim in claims:
        interval = None if claim.low is None or claim.high is None else (claim.low, claim.high)
        difference = number(claim.difference, interval)
        seeds = f"{claim.seeds} seed{'s' if claim.seeds != 1 else ''}"
        rows.append([
            Cell(claim.says, f"{claim.measure} {claim.expected} along {claim.axis}"),
            Cell(claim.verdict, mark=_mark(claim.verdict)),
            Cell(difference.text, f"{difference.below} {seeds}".strip(), difference.value),
            Cell(_by_label(claim.found)),
            Cell(_by_label(claim.published), claim.source),
            Cell("; ".join(f"{start} to {end}: {told}" for start, end, told in claim.neighbours) or "–"),
        ])  # fmt: skip
    return Table("Claims and what the runs say to them", head, rows)


def _published(claims: Sequence[ClaimVerdict]) -> list[Block]:
    if not any(claim.published for claim in claims):
        return []
    return [
        Text(
            "Published values are of the papers' own settings: compare their direction and size, not their digits.",
            "remark",
        )
    ]


def _by_label(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name}: {short(float(value))}" for name, value in values.items()) or "–"


def _mark(verdict: str) -> str:
    """The class that colours a verdict."""
    for begins, mark in (("holds", "holds"), ("reversed", "fails"), ("cannot be told", "open")):
        if verdict.startswith(begins):
            return mark
    return ""
