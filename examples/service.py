"""Named entities over HTTP, several requests in one batch: uvicorn --app-dir examples service:app.

POST /entities takes {"texts": ["…"]} and answers {"entities": [[{"text", "label", "start", "end", "score"}]]}, a list
per text. GET /health names the package, which the environment variable MODEL sets. Too large a request is answered with
413 or 422, too many requests with 503, and a slow answer with 504.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain, islice
from typing import NamedTuple

import spacy
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from spacy.tokens import Doc

MAX_BYTES, MAX_TEXTS, MAX_CHARACTERS = 128 * 1024, 64, 10_000  # of a request, in a request, in a text
MAX_WAITING, SECONDS, BATCH = 64, 30, 64  # waiting requests, seconds until a request fails, texts in a batch
MODEL = os.environ.get("MODEL", "it_panx_xlmr")

try:
    nlp = spacy.load(MODEL)
except (OSError, ValueError):
    raise SystemExit(f"Cannot load {MODEL!r}; install the package's wheel, or set MODEL to another package.") from None


class Texts(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(str_max_length=MAX_CHARACTERS)
    texts: list[str] = Field(max_length=MAX_TEXTS)


class Job(NamedTuple):
    """A waiting request; `answer` gets a list of entities for each text, or an exception."""

    request: Request
    texts: list[str]
    answer: asyncio.Future


queue: asyncio.Queue[Job] = asyncio.Queue(MAX_WAITING)


def entities_of(doc: Doc) -> list[dict]:
    """Return the entities with their offsets in characters."""
    keys = ("text", "label", "start", "end", "score")
    values = ((e.text, e.label_, e.start_char, e.end_char, getattr(e._, "panx_score", None)) for e in doc.ents)
    return [dict(zip(keys, entity, strict=True)) for entity in values]


def compute(batch: list[list[str]]) -> list[list[list[dict]] | Exception]:
    """Return the answer to each request's texts. If a batch fails, compute each request alone."""
    try:
        with nlp.memory_zone():
            found = map(entities_of, nlp.pipe(chain(*batch)))
            return [list(islice(found, len(texts))) for texts in batch]
    except Exception as error:
        return [error] if len(batch) == 1 else [answer for texts in batch for answer in compute([texts])]


async def work() -> None:
    """Answer the waiting requests, except those that timed out or whose client disconnected."""
    while jobs := [await queue.get()]:
        while not queue.empty() and sum(len(job.texts) for job in jobs) < BATCH:
            jobs.append(queue.get_nowait())
        for job in jobs:
            if not job.answer.done() and await job.request.is_disconnected():
                job.answer.set_result([])
        jobs = [job for job in jobs if not job.answer.done()]
        answers = await asyncio.to_thread(compute, [job.texts for job in jobs])
        for job, answer in zip(jobs, answers, strict=True):
            if not job.answer.done():
                job.answer.set_result(answer)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    worker = asyncio.create_task(work())
    yield  # until the server has answered all requests
    worker.cancel()


app = FastAPI(title="Italian named entities", lifespan=lifespan, max_body_size=MAX_BYTES)
schema = {"requestBody": {"content": {"application/json": {"schema": Texts.model_json_schema()}}}}


@app.post("/entities", openapi_extra=schema)
async def entities(request: Request) -> dict[str, list[list[dict]]]:
    try:
        async with asyncio.timeout(SECONDS):
            job = Job(request, Texts.model_validate_json(await request.body()).texts, asyncio.Future())
            queue.put_nowait(job)
            if isinstance(answer := await job.answer, Exception):
                raise answer
            return {"entities": answer}
    except ValidationError as error:
        raise HTTPException(422, "; ".join(f"body{[*e['loc']]}: {e['msg']}" for e in error.errors()[:3])) from None
    except asyncio.QueueFull:
        raise HTTPException(503, "Too many requests are waiting; try again later.", {"Retry-After": "1"}) from None
    except TimeoutError:
        raise HTTPException(504, f"No answer in {SECONDS} s; send less text, or try again later.") from None


@app.get("/health")
async def health() -> dict[str, str | int]:
    return {"status": "ok", "model": f"{nlp.lang}_{nlp.meta['name']}-{nlp.meta['version']}", "waiting": queue.qsize()}
