"""Figures of a run in the project's documents."""

import pytest
from pilotbed_suite import GridError
from pilotbed_suite.document import publish, table

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"


def test_publish_replaces_what_stands_between_the_markers():
    once = publish(f"before\n{BEGIN}\nold\n{END}\nafter\n", "figures", "new\n\n")
    assert once == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert publish(once, "figures", "new") == once


@pytest.mark.parametrize("document", ["nothing", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_publish_refuses_a_document_without_its_two_lines(document):
    with pytest.raises(GridError, match="once each"):
        publish(document, "figures", "new")


def test_a_table_is_markdown():
    assert table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
