"""What all pictures of sweeps have in common."""

import io

from matplotlib.figure import Figure


def png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120, metadata={"Software": "medsynth"})
    return data.getvalue()
