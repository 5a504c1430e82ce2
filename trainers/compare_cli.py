"""The command `medsynth compare`."""

from typing import Annotated

import typer

from cluster.terminal import ask, console, plain


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Evaluation folders or s3:// prefixes; or MLflow run ids, runs:/ID or models:/NAME/VERSION, "
            "of which the latest evaluation counts.",
        ),
    ],
    price: Annotated[
        float | None, typer.Option(min=0, help="Of one GPU for an hour, for the cost of training.")
    ] = None,
    markdown: Annotated[str | None, typer.Option(metavar="FILE", help="Write the table as Markdown.")] = None,
    latex: Annotated[str | None, typer.Option(metavar="FILE", help="Write the table as LaTeX (booktabs).")] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw quality against cost, as PNG.")] = None,
    plot_measure: Annotated[
        str | None, typer.Option(metavar="NAME", help="Quality of the plot, such as fid. Default: the first two have.")
    ] = None,
    plot_against: Annotated[
        str | None,
        typer.Option(metavar="COST", help="cost, hours, energy or seconds. Default: the first two have."),
    ] = None,
) -> None:
    """Set several runs' evaluations side by side: quality, diversity, copying, and what they cost.

    medsynth compare models:/msdm-medvqa-gi@champion evaluations/flux --price 4 --latex table.tex --plot cost.png
    """
    from cluster import storage
    from trainers.compare import compare as set_side_by_side
    from trainers.compare import open_evaluation, quality_cost_plot, render, to_latex, to_markdown

    ask(*runs)
    evaluations = [open_evaluation(run) for run in runs]
    table = set_side_by_side(evaluations, price_per_gpu_hour=price)
    render(table, console)
    if markdown:
        storage.write_bytes(markdown, to_markdown(table).encode())
    if latex:
        storage.write_bytes(latex, to_latex(table).encode())
    if plot:
        png = quality_cost_plot(evaluations, price_per_gpu_hour=price, measure=plot_measure, against=plot_against)
        storage.write_bytes(plot, png)
    for written in filter(None, (markdown, latex, plot)):
        console.print(f"Written: {plain(written)}", soft_wrap=True)
