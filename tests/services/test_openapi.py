"""The OpenAPI document: valid, complete, and true of what the service answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.specs.openapi.definitions import OPENAPI_31

from tests.services.api_support import Site, open_site, trained


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("openapi"), allowed_hosts=("testserver",)) as one:
        one.enter("begun", *trained([0.5, 0.2, None]), state="running")
        one.enter("done", *trained([0.5, 0.2, 0.3]), state="finished")
        yield one


@pytest.fixture(scope="module")
def document(site: Site) -> dict[str, Any]:
    answer = site.client().get("/openapi.json")
    assert answer.status_code == 200
    return dict(answer.json())


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(method, path, what) for path, item in document["paths"].items() for method, what in item.items()]


def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]):
    assert document["openapi"].startswith("3.1")
    jsonschema_rs.validator_for(OPENAPI_31).validate(document)


def test_every_schema_in_it_is_a_valid_json_schema(document: dict[str, Any]):
    for name, schema in document["components"]["schemas"].items():
        assert jsonschema_rs.meta.is_valid(schema), name


def test_every_reference_in_it_leads_somewhere(document: dict[str, Any]):
    def references(node: Any) -> Iterator[str]:
        match node:
            case {"$ref": str(reference)}:
                yield reference
            case dict():
                yield from (one for value in node.values() for one in references(value))
            case list():
                yield from (one for value in node for one in references(value))

    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    used = set(references(document))
    assert used <= known
    assert {"#/components/schemas/Problem"} <= used


def test_every_operation_has_a_name_a_summary_and_its_errors(document: dict[str, Any]):
    found = operations(document)
    assert len({what["operationId"] for _, _, what in found}) == len(found) >= 17
    for method, path, what in found:
        assert what["summary"], path
        assert what["description"], path
        if path == "/healthz":
            continue
        assert "401" in what["responses"], path
        for status, answer in what["responses"].items():
            if int(status) >= 400 and path != "/readyz":
                schema = answer["content"]["application/problem+json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}, (method, path, status)


def test_only_healthz_is_open(document: dict[str, Any]):
    assert document["security"] == [{"token": []}]
    assert document["components"]["securitySchemes"]["token"] == {"type": "http", "scheme": "bearer"}
    open_to_all = [path for _, path, what in operations(document) if what.get("security") == []]
    assert open_to_all == ["/healthz"]


# -- what it answers, found by schemathesis ----------------------------------------------------------------------------

CHECKS = [
    checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    ignored_auth,
]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
def test_answers_are_as_documented(mode: GenerationMode, site: Site):
    token = {"Authorization": f"Bearer {site.admin}"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", site.app, headers=token)
    tried = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        try:
            strategy = operation.as_strategy(generation_mode=mode)
        except Unsatisfiable:
            continue

        @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=strategy)
        def holds(case: schemathesis.Case) -> None:
            nonlocal tried
            tried += 1
            # Else hardly a sweep has the name that was made up; and events of one that goes on do not end.
            if "sweep" in case.path_parameters and tried % 4:
                case.path_parameters["sweep"] = "done" if tried % 2 or case.path.endswith("/events") else "begun"
            case.call_and_validate(headers=token, checks=CHECKS)

        with contextlib.suppress(Unsatisfiable):  # nothing can be wrong in what asks for nothing
            holds()
    assert tried > 150
