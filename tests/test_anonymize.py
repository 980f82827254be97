"""The example in examples/presidio/, with a pipeline of rules in place of a trained one."""

import re

import pytest
import spacy
from spacy.util import load_config

from conftest import invoke
from lookup_ner import pipeline, trained

anonymize = pytest.importorskip("presidio.anonymize", reason="examples/requirements.txt is not installed")


@pytest.fixture
def anonymized(model, tmp_path):
    """Runs the example on bytes, with the pipeline of rules and one change of the YAML file."""

    def run(content, *options, old="it_panx_xlmr", new=str(model)):
        config, text = tmp_path / "analyzer.yaml", tmp_path / "text.txt"
        config.write_text(anonymize.CONFIG.read_text().replace(old, new).replace("it_panx_xlmr", str(model)))
        text.write_bytes(content)
        return invoke(anonymize.main, text, "--config", config, *options)

    return run


@pytest.mark.parametrize(("options", "place"), [([], "<LOCATION>"), (["--threshold", "0.7"], "Torino")])
def test_names_above_the_threshold_and_other_data_become_placeholders(anonymized, monkeypatch, options, place):
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: asked.append(address))
    text = "Rita, Torino e Bari\r\nrita@esempio.it 011 5621234\npassaporto YA1234567 😀"
    assert anonymized(text.encode(), *options).stdout_bytes.decode() == (
        f"<PERSON>, {place} e <LOCATION>\r\n<EMAIL_ADDRESS> <PHONE_NUMBER>\npassaporto <IT_PASSPORT> 😀"
    )
    assert asked == []


def test_a_name_below_the_threshold_of_the_package_becomes_a_placeholder(tmp_path):
    nlp = pipeline()
    trained(nlp)
    nlp.get_pipe("ner").cfg["temperature"] = 2.0
    nlp.to_disk(tmp_path / "model")
    settings = load_config(tmp_path / "model" / "config.cfg")
    settings["components"]["ner"]["threshold"] = 1.0
    settings.to_disk(tmp_path / "model" / "config.cfg")
    text, config = "Anna Neri vive a Bari", tmp_path / "analyzer.yaml"
    assert not spacy.load(tmp_path / "model")(text).ents
    config.write_text(anonymize.CONFIG.read_text().replace("it_panx_xlmr", str(tmp_path / "model")))
    assert anonymize.anonymize(text, anonymize.load_analyzer(config)) == "<PERSON> vive a <LOCATION>"


@pytest.mark.parametrize(
    ("arguments", "change", "said"),
    [
        ([b"citt\xe0"], {}, "text.txt: .*UTF-8"),
        ([b"a" * 1_000_001], {}, "text.txt: .*at most 1000000"),
        ([b"Rita", "--language", "es"], {}, "analyzer.yaml: no language 'es'"),
        ([b"Rita"], {"old": "it_panx_xlmr", "new": "nessuno"}, "analyzer.yaml: .*nessuno"),
        ([b"Rita"], {"old": "default_score_threshold: 0.4", "new": ""}, "'default_score_threshold' is missing"),
        ([b"Rita"], {"old": "EmailR", "new": "MailR"}, "analyzer.yaml: .*MailRecognizer"),
        ([b"Rita"], {"old": "[it]", "new": "[it"}, "analyzer.yaml: .*expected ','"),
        ([b"Rita"], {"old": "default: 0.3", "new": "default: 7"}, "analyzer.yaml: .*between 0.0 and 1.0"),
    ],
)
def test_a_text_or_a_configuration_that_cannot_be_used_is_one_sentence(anonymized, arguments, change, said):
    result = anonymized(*arguments, **change)
    assert result.exit_code == 1
    assert re.search(said, result.output)
    assert result.output.count("\n") == 1
