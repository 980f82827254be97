"""A web page that shows the entities of a text as you type: python examples/page.py prints its address."""

import os
import warnings

warnings.filterwarnings("ignore", module="gradio")  # it uses the old name of a constant of Starlette
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}  # gradio reads them when imported

import gradio as gr
import spacy

EXAMPLE = "Rita Levi-Montalcini nacque a Torino; la Ferrari ha sede a Maranello."
COLOURS = {"PER": "#f4a261", "ORG": "#4c9be8", "LOC": "#57b894"}
MAX_CHARACTERS = 5_000
MODEL = os.environ.get("MODEL", "it_panx_xlmr")

try:
    nlp = spacy.load(MODEL)
except (OSError, ValueError):
    raise SystemExit(f"Cannot load {MODEL!r}; install the package's wheel, or set MODEL to another package.") from None


def entities(text: str) -> dict:
    """Return the text and its entities as gradio's HighlightedText expects them, with offsets in characters."""
    text = text[:MAX_CHARACTERS]
    with nlp.memory_zone():
        found = [{"entity": ent.label_, "start": ent.start_char, "end": ent.end_char} for ent in nlp(text).ents]
    return {"text": text, "entities": found}


with gr.Blocks(title="Italian named entities", analytics_enabled=False) as page:
    gr.Markdown("# People, organisations and places in Italian text")
    typed = gr.Textbox(EXAMPLE, label="Text", lines=5, max_length=MAX_CHARACTERS, autofocus=True)
    shown = gr.HighlightedText(label="Entities", elem_id="entities", color_map=COLOURS)
    # always_last: of the texts typed during a computation, only the newest is computed
    gr.on([page.load, typed.input], entities, typed, shown, show_progress="hidden", trigger_mode="always_last")

if __name__ == "__main__":
    page.launch(footer_links=[])
