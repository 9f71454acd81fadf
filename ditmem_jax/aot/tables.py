"""Reports of compiled programs as text: one report, the rows of a sweep, JSON."""

import dataclasses
from typing import Any

from rich.table import Table

from ditmem_jax.aot import roof
from ditmem_jax.aot.compile import Report


def as_table(report: Report) -> Table:
    """All of a report, in the width of a terminal."""
    name, seconds = report.roof
    table = Table(title=_title(report), title_justify="left", show_header=False, min_width=70)
    if not report.fits:
        table.add_row("does not fit", report.statement or f"{report.hbm / roof.GIB:.2f} GiB of HBM")
        table.add_row("compile time", f"{report.compile_seconds:.0f} s")
        return table
    table.add_row(
        "fits", f"{report.total / roof.GIB:.2f} of {report.hbm / roof.GIB:.2f} GiB of each chip's HBM"
    )
    for kind, size in report.memory.items():
        table.add_row(f"  {kind}", f"{size / roof.GIB:.2f} GiB")
    for kind, size in report.beside.items():
        table.add_row(f"  {kind}, beside", f"{size / roof.GIB:.2f} GiB")
    if report.host:
        table.add_row("  on the host, per chip", f"{report.host / roof.GIB:.2f} GiB")
    table.add_section()
    table.add_row("a step of each chip", f"{(report.operations + report.kernels) / 1e12:.1f} T operations")
    table.add_row(
        "  in Pallas kernels", f"{report.kernels / 1e12:.1f} T, by formula: XLA does not count them"
    )
    table.add_row("  HBM", f"{report.hbm_bytes / 1e9:.1f} GB read and written")
    table.add_row("  interconnect", f"{report.collective_bytes / 1e9:.2f} GB sent, most of it in")
    for kind, shape, size in report.collectives:
        table.add_row(f"    {kind}", f"{size / 1e9:.2f} GB, {shape}")
    if report.uncounted:
        table.add_row("  not counted", ", ".join(report.uncounted))
    table.add_section()
    table.add_row("at best", f"{seconds:.3f} s a step, by {name}")
    table.add_row("  by each", ", ".join(f"{name} {seconds:.3f} s" for name, seconds in report.roofs.items()))
    table.add_row("compile time", f"{report.compile_seconds:.0f} s")
    return table


def as_rows(reports: list[Report]) -> Table:
    """A line for each mesh, the recommended one first."""
    table = Table(title=f"{reports[0].program} on {reports[0].topology}", title_justify="left")
    for column in ("mesh", "remat", "batch", "GiB", "at best, s/sample", "by"):
        table.add_column(column)
    for report in reports:
        size = f"{report.total / roof.GIB:.1f}" if report.fits else "does not fit"
        name, seconds = report.roof
        best = f"{seconds / report.batch:.3f}" if report.fits else ""
        table.add_row(mesh_flags(report), report.remat, str(report.batch), size, best, name)
    return table


def _title(report: Report) -> str:
    batch = f"batch {report.batch}, {report.tokens:,} tokens, weights {report.weights}"
    return f"{report.program} on {report.topology}, {mesh_flags(report)}: {batch}" + (
        f", remat {report.remat}" if report.remat else ""
    )


def mesh_flags(report: Report) -> str:
    return " ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1) or "one chip"


def as_json(report: Report) -> dict[str, Any]:
    name, seconds = report.roof
    best = {"limit": name, "seconds": seconds} if report.fits else None
    total = report.total if report.fits else None
    return dataclasses.asdict(report) | {"total_memory": total, "at_best": best}
