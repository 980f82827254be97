"""A page that shows the entities of a text as it is typed: python examples/page.py prints its address."""

import os
import warnings

warnings.filterwarnings("ignore", module="gradio")  # it names a constant of Starlette's as it was called before
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}  # before gradio is imported

import gradio as gr
import spacy

EXAMPLE = "Rita Levi-Montalcini nacque a Torino; la Ferrari ha sede a Maranello."
COLOURS = {"PER": "#f4a261", "ORG": "#4c9be8", "LOC": "#57b894"}
LENGTH = 5_000  # characters of the longest text

try:
    nlp = spacy.load(os.environ.get("MODEL", "it_panx_xlmr"))
except (OSError, ValueError) as error:  # a folder has not the code of its pipeline
    raise SystemExit(f"{error} Install its wheel, or set MODEL to another such package's name.") from None


def entities(text: str) -> dict:
    """The text and its entities as gradio's HighlightedText takes them, positions in characters."""
    with nlp.memory_zone():  # the vocabulary forgets the text's words after it
        found = [{"entity": e.label_, "start": e.start_char, "end": e.end_char} for e in nlp(text[:LENGTH]).ents]
    return {"text": text[:LENGTH], "entities": found}


with gr.Blocks(title="Italian named entities", analytics_enabled=False) as page:
    gr.Markdown("# People, organisations and places in Italian text")
    typed = gr.Textbox(EXAMPLE, label="Text", lines=5, max_length=LENGTH, autofocus=True)
    shown = gr.HighlightedText(label="Entities", elem_id="entities", color_map=COLOURS)
    # always_last: while one text is computed, only the newest of those typed meanwhile waits
    gr.on([page.load, typed.input], entities, typed, shown, show_progress="hidden", trigger_mode="always_last")

if __name__ == "__main__":
    font = ["system-ui", "sans-serif"]  # gradio's own themes ask Google for fonts
    theme = gr.themes.Default(font=font, font_mono=["monospace"])
    page.launch(theme=theme, footer_links=[])
