"""Replace personal data in Italian text with placeholders: python examples/presidio/anonymize.py letter.txt."""

import sys
from pathlib import Path
from typing import Annotated

import tldextract
import typer
import yaml
from presidio_analyzer import AnalyzerEngine
from presidio_analyzer.input_validation import ConfigurationValidator
from presidio_analyzer.nlp_engine import NlpArtifacts, NlpEngineProvider, SpacyNlpEngine
from presidio_analyzer.predefined_recognizers import SpacyRecognizer
from presidio_analyzer.recognizer_registry import RecognizerRegistryProvider
from presidio_anonymizer import AnonymizerEngine
from spacy.tokens import Doc

CONFIG = Path(__file__).with_name("analyzer.yaml")
# Presidio's e-mail recognizer downloads a list of domains by default; this one uses tldextract's copy
tldextract.extract = tldextract.TLDExtract(cache_dir=None, suffix_list_urls=())


class PanxNlpEngine(SpacyNlpEngine):
    """Presidio's spaCy engine, with `ent._.panx_score` as the score of an entity."""

    engine_name = "panx_xlmr"

    def load(self) -> None:
        """Load the pipelines and let them return every entity: the recognizer's threshold alone decides."""
        super().load()
        for nlp in self.nlp.values():
            if nlp.has_pipe("ner"):
                nlp.get_pipe("ner").threshold = 0.0

    @staticmethod
    def _download_spacy_model_if_needed(model_name: str) -> None:
        """Download nothing; `spacy.load` raises OSError for a package that is not installed."""

    def _get_scores_for_entities(self, doc: Doc) -> list[float]:
        default = self.ner_model_configuration.default_score
        scores = [getattr(ent._, "panx_score", None) for ent in doc.ents]
        return [default if score is None else score for score in scores]

    def _doc_to_nlp_artifact(self, doc: Doc, language: str) -> NlpArtifacts:
        for token in doc:  # Presidio looks for context words among the lemmas, which the pipeline does not set
            token.lemma_ = token.lemma_ or token.lower_
        return super()._doc_to_nlp_artifact(doc, language)


def load_analyzer(config: Path = CONFIG, threshold: float | None = None) -> AnalyzerEngine:
    """Return the analyzer that a YAML file describes; `threshold` overrides the file's threshold for entities."""
    settings = ConfigurationValidator.validate_analyzer_configuration(yaml.safe_load(config.read_text("utf8")))
    languages = settings["supported_languages"]
    engine = NlpEngineProvider((PanxNlpEngine,), nlp_configuration=settings["nlp_configuration"]).create_engine()
    registry_settings = settings["recognizer_registry"] | {"supported_languages": languages}
    registry = RecognizerRegistryProvider(None, registry_settings, engine).create_recognizer_registry()
    for recognizer in registry.recognizers:
        if isinstance(recognizer, SpacyRecognizer) and threshold is not None:
            recognizer.score_thresholds = {"default": threshold}
    return AnalyzerEngine(
        registry,
        engine,
        default_score_threshold=settings["default_score_threshold"],
        supported_languages=languages,
    )


def anonymize(text: str, analyzer: AnalyzerEngine, language: str = "it") -> str:
    """Return the text with a placeholder such as `<PERSON>` in place of each finding."""
    return AnonymizerEngine().anonymize(text, analyzer.analyze(text, language)).text


def main(
    source: Annotated[Path, typer.Argument(help="A text file in UTF-8; - is the standard input.")] = Path("-"),
    threshold: Annotated[float | None, typer.Option(min=0, max=1, help="The lowest panx_score of an entity.")] = None,
    language: str = "it",
    config: Path = CONFIG,
) -> None:
    """Print the text of SOURCE with placeholders in place of personal data."""
    try:
        data = sys.stdin.buffer.read() if source == Path("-") else source.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{source}: {error}; expected a text file in UTF-8.")
    try:
        analyzer = load_analyzer(config, threshold)
    except KeyError as error:
        sys.exit(f"{config}: the key {error} is missing; add it as in {CONFIG}.")
    except Exception as error:  # Presidio and PyYAML have no common class for errors in a configuration
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        sys.exit(f"{config}: {reason}; correct the file, or install the package that it names.")
    if language not in analyzer.supported_languages:
        sys.exit(f"{config}: no language {language!r}; add it and its package, or choose another --language.")
    if len(text) > (longest := analyzer.nlp_engine.get_nlp(language).max_length):
        sys.exit(f"{source}: {len(text)} characters; split it into texts of at most {longest}.")
    sys.stdout.buffer.write(anonymize(text, analyzer, language).encode())


if __name__ == "__main__":
    typer.run(main)
