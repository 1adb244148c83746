"""The precision of every linear layer as a picture: layers x projections, coloured by what each is held in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

# From few bits (warm) to many (cool); Okabe and Ito's palette, which the colour-blind can tell apart.
_COLOURS = {
    "int4": "#D55E00", "fp8": "#E69F00", "fp8-dynamic": "#F0E442", "int8": "#009E73", "fp16": "#56B4E9",
    "bf16": "#0072B2",
}  # fmt: skip
_UNKNOWN = "#999999"
# Top to bottom in the order of a layer.
_ORDER = (
    "attention.qkv", "attention.fused_a", "attention.q_b_proj", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj",
    "mlp.shared_expert.fc", "mlp.shared_expert.proj",
)  # fmt: skip
_PREFIX = "transformer.layers."


def precision_picture(precisions: Mapping[str, str]) -> go.Figure:
    """A heat map of {global linear name: precision name}, such as {"transformer.layers.3.mlp.fc": "int4"}.

    A layer without a projection (a dense one among mixtures) is left blank there. Colours of text are the page's.
    """
    import plotly.graph_objects as go

    cells = {_place(name): precision for name, precision in precisions.items() if name.startswith(_PREFIX)}
    layers = sorted({layer for layer, _ in cells})
    projections = sorted({projection for _, projection in cells}, key=_rank)
    names = [name for name in _COLOURS if name in cells.values()]
    names += sorted(set(cells.values()) - set(_COLOURS))
    codes = [
        [names.index(cells[layer, projection]) if (layer, projection) in cells else None for layer in layers]
        for projection in projections
    ]
    held = [[cells.get((layer, projection), "") for layer in layers] for projection in projections]
    figure = go.Figure(
        go.Heatmap(
            z=codes, x=layers, y=projections, text=held, colorscale=_scale(names), zmin=-0.5, zmax=len(names) - 0.5,
            showscale=False, xgap=1, ygap=1, hovertemplate="layer %{x}, %{y}: %{text}<extra></extra>",
        )
    )  # fmt: skip
    for name in names:
        marker = {"color": _COLOURS.get(name, _UNKNOWN), "size": 12, "symbol": "square"}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=marker)
    figure.update_layout(
        template="none", showlegend=True, height=120 + 34 * len(projections),
        margin={"l": 10, "r": 10, "t": 10, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        xaxis={"title": "decoder layer", "showgrid": False, "zeroline": False, "dtick": max(1, len(layers) // 8)},
        yaxis={"autorange": "reversed", "showgrid": False, "automargin": True},
    )  # fmt: skip
    return figure


def _place(name: str) -> tuple[int, str]:
    layer, projection = name.removeprefix(_PREFIX).split(".", 1)
    return int(layer), projection


def _rank(projection: str) -> tuple[int, str]:
    return (_ORDER.index(projection) if projection in _ORDER else len(_ORDER), projection)


def _scale(names: list[str]) -> list[list[float | str]]:
    """One flat band of colour for each name."""
    bands: list[list[float | str]] = []
    for index, name in enumerate(names):
        colour = _COLOURS.get(name, _UNKNOWN)
        bands += [[index / len(names), colour], [(index + 1) / len(names), colour]]
    return bands
