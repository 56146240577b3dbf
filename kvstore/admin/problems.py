"""Errors as problem documents (RFC 9457), with a remedy where there is one."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from kvstore.errors import (
    BlockNotFound,
    CatalogUnavailable,
    ConfigError,
    DeadlineExceeded,
    IdentityError,
    KVStoreError,
    NodeUnavailable,
    ProtocolError,
    TierUnavailable,
)

log = structlog.get_logger(__name__)

MEDIA_TYPE = "application/problem+json"

_STATUS: dict[type[KVStoreError], int] = {
    BlockNotFound: 404,
    ConfigError: 422,
    IdentityError: 422,
    ProtocolError: 422,
    NodeUnavailable: 503,
    CatalogUnavailable: 503,
    TierUnavailable: 503,
    DeadlineExceeded: 504,
}

_REMEDY: dict[type[KVStoreError], str] = {
    NodeUnavailable: "Start the node with kvstore node, and see its log.",
    CatalogUnavailable: "See kvstore catalog status, and the Redis or Valkey server.",
    TierUnavailable: "See kvstore doctor for the storage behind the tier.",
}


class ProblemDocument(BaseModel):
    """What every error looks like."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:kvstore:problem:node-unavailable",
                    "title": "Service Unavailable",
                    "status": 503,
                    "detail": "no node answers at /run/kvstore/node.sock",
                    "remedy": "Start the node with kvstore node, and see its log.",
                }
            ]
        },
    )

    type: str = Field(description="Names the kind of problem; about:blank when the status says it all.")
    title: str
    status: int
    detail: str = ""
    remedy: str = ""


class Problem(Exception):
    """An error that a route answers with. ``members`` are added to the document."""

    def __init__(self, status: int, kind: str, detail: str, remedy: str = "", **members: Any) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.detail = detail
        self.remedy = remedy
        self.members = members

    def response(self) -> JSONResponse:
        document = {
            "type": f"urn:kvstore:problem:{self.kind}" if self.kind else "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            **({"remedy": self.remedy} if self.remedy else {}),
            **self.members,
        }
        return JSONResponse(document, self.status, media_type=MEDIA_TYPE)


def problem_of(error: KVStoreError) -> Problem:
    """This package's errors, as problems."""
    kind = next((kind for kind in type(error).__mro__ if kind in _STATUS), KVStoreError)
    slug = "".join(f"-{c.lower()}" if c.isupper() else c for c in type(error).__name__).lstrip("-")
    return Problem(_STATUS.get(kind, 500), slug, str(error), _REMEDY.get(kind, ""))


def install(app: FastAPI) -> None:
    """Have ``app`` answer every error with a problem document."""

    @app.exception_handler(Problem)
    def _problem(_: Request, error: Problem) -> JSONResponse:
        return error.response()

    @app.exception_handler(KVStoreError)
    def _ours(_: Request, error: KVStoreError) -> JSONResponse:
        return problem_of(error).response()

    @app.exception_handler(RequestValidationError)
    def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        errors = [
            {"field": ".".join(str(part) for part in one["loc"]), "problem": one["msg"]} for one in error.errors()[:20]
        ]
        detail = f"{errors[0]['field']}: {errors[0]['problem']}" if errors else "the request does not fit"
        return Problem(422, "invalid-request", detail, errors=errors).response()

    @app.exception_handler(HTTPException)
    def _http(_: Request, error: HTTPException) -> JSONResponse:
        response = Problem(error.status_code, "", str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    def _bug(request: Request, error: Exception) -> JSONResponse:
        log.error("request failed", method=request.method, path=request.url.path, exc_info=error)
        return Problem(500, "internal", "this is a defect; the API's log has the details").response()


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route, for its document: these statuses answer with a problem."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "model": ProblemDocument,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}},
        }
        for status in statuses
    }
