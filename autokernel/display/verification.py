"""`autokernel verify` for people: entry by entry, what still holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from autokernel.display.layout import spaced, table
from autokernel.display.tables import scenario_table
from autokernel.display.words import ratio

if TYPE_CHECKING:
    from autokernel.export.verify import VerifyReport


def verify_view(report: VerifyReport) -> RenderableType:
    """Entries, scenarios, and the verdict in a sentence."""
    parts: list[RenderableType] = []
    if report.environment_reason is not None:
        parts.append(Text(f"Nothing of this bundle applies here: {report.environment_reason}.", "red"))
    if report.entries:
        shown = table(
            ("entry", "fold"), ("scenario", "fold"), ("sites", "right"), ("promised", "right"), "here [95 %]", "holds",
            ("why", "fold"), title="Entries",
        )  # fmt: skip
        for entry in report.entries:
            shown.add_row(
                Text(entry.key),
                entry.scenario,
                str(entry.hits),
                f"{entry.promised:.2f}×",
                ratio(entry.speedup) if entry.speedup is not None else "",
                Text("yes", "bold green") if entry.holds else Text("no", "bold red"),
                Text(entry.message, "dim"),
            )
        parts.append(shown)
    if report.scenarios:
        parts.append(scenario_table(report.scenarios))
    count = f": {sum(entry.holds for entry in report.entries)} of {len(report.entries)} entries hold" if report.entries else ""
    slower = [result.scenario for result in report.scenarios if not result.passed]
    also = f"; slower than stock: {', '.join(slower)}" if slower else ""
    if report.passed:
        parts.append(Text(f"The bundle holds{count or ': it has no entries, and no scenario is slower'}.", "bold green"))
    else:
        parts.append(Text(f"The bundle does not hold here{count}{also}; tune again on this machine.", "bold red"))
    return spaced(parts)
