"""Run examples/tour.ipynb in place and keep its pictures small: 256 colours each."""

import argparse
import base64
import io
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "tour.ipynb"


def with_few_colours(png: str) -> str:
    """Reduces a base64-encoded picture of a notebook to a palette."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    small = io.BytesIO()
    picture.quantize(256).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main() -> None:
    """Runs the notebook, shrinks its pictures and writes it."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--pictures_only", action="store_true", help="keep the outputs there are")
    options = p.parse_args()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if not options.pictures_only:
        where = {"metadata": {"path": str(NOTEBOOK.parent)}}
        NotebookClient(notebook, timeout=3600, resources=where, record_timing=False).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if png := output.get("data", {}).get("image/png"):
                output["data"]["image/png"] = with_few_colours(png)
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.name}: {NOTEBOOK.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
