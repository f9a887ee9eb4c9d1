"""`vila bench`: measurements that users run on their own machine."""

from __future__ import annotations

import typer

from vila.cli.bench_decode import decode
from vila.cli.bench_quality import quality
from vila.cli.bench_serve import serve

app = typer.Typer(help="Measure speed and quality on this machine.", no_args_is_help=True, rich_markup_mode="rich")
app.command()(decode)
app.command()(quality)
app.command()(serve)
