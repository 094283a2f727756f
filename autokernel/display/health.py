"""`autokernel doctor` for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from autokernel.display.layout import spaced, table

if TYPE_CHECKING:
    from autokernel.doctor import DoctorReport

_MARKS = {"ok": ("✓", "green"), "advice": ("!", "yellow"), "missing": ("✗", "bold red")}


def doctor_view(report: DoctorReport) -> RenderableType:
    """What was found, then the commands that fix what is not in order, then the verdict."""
    shown = table("", ("", "left"), ("", "fold"))
    shown.show_header = False
    group = ""
    for finding in report.findings:
        if finding.group != group:
            group = finding.group
            shown.add_row("", Text(group, "bold"), "")
        mark, style = _MARKS[finding.state]
        shown.add_row(Text(mark, style), f"  {finding.name}", Text(finding.value, "" if finding.state == "ok" else style))
    parts: list[RenderableType] = [shown]
    fixes = [finding for finding in report.findings if finding.fix]
    if fixes:
        lines = Text("To mend\n", "bold")
        for finding in fixes:
            lines.append(f"  {finding.name}: ", _MARKS[finding.state][1])
            lines.append(f"{finding.fix}\n", "default")
        lines.rstrip()
        parts.append(lines)
    parts.append(_verdict(report))
    return spaced(parts)


def _verdict(report: DoctorReport) -> Text:
    if report.can_run:
        what = " and ".join({"cpu": "CPU kernels", "cuda": "GPU kernels"}[device] for device in report.devices)
        return Text(f"This machine can tune {what}.", "bold green")
    missing = ", ".join(dict.fromkeys(f.name for f in report.findings if f.state == "missing"))
    return Text(f"This machine cannot run anything yet: {missing or 'no device to tune for'}.", "bold red")
