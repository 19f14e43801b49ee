"""The query widget of notebook 04 in a real browser: pick a user, find and rate films, see the list change."""

from __future__ import annotations

import pytest
from lab_server import free_port, lab_command, run_cells, serve, wait_for_kernel, write_notebook

pytestmark = [pytest.mark.browser, pytest.mark.timeout(500)]

SET_UP = """
from recsys_edu.datasets.movielens import load_movielens_100k
from recsys_edu.datasets.movielens_splits import interactions, split_per_user
from recsys_edu.retrieval.rating import train_rating_model
from recsys_edu.retrieval.recommender import TwoStageRecommender
from recsys_edu.retrieval.training import TowerSettings, train_towers
from recsys_edu.viz.retrieval import recommender_widget

data = load_movielens_100k()
split = split_per_user(interactions(data), seed=0)
settings = TowerSettings(("user", "history", "age", "occupation", "item", "title", "genres"), epochs=2, batch_size=2048)
tower, features = train_towers(data, split, settings)
recommender = TwoStageRecommender(data, split.train, tower, features, train_rating_model(split.train))
"""


def test_pick_a_user_rate_films_and_see_the_list_change(open_page, expect, picture, tmp_path):
    folder = tmp_path / "notebooks"
    write_notebook(folder / "widget.ipynb", [SET_UP, "recommender_widget(recommender, user=41)"])
    port = free_port()
    with serve(lab_command(port), folder, port, tmp_path / "lab.log") as address:
        page, seen = open_page()
        page.goto(f"{address}/lab/tree/widget.ipynb")
        wait_for_kernel(page)
        run_cells(page, expect, 2, timeout_ms=180_000)
        output = page.locator(".jp-Notebook .jp-CodeCell").nth(1).locator(".jp-Cell-outputArea")
        output.scroll_into_view_if_needed()
        expect(output).to_contain_text("User number 41")
        first_list = films_of(output)
        assert len(first_list) == 10 and "(new)" not in output.inner_text()
        picture(page, "widget_user")

        rate(page, output, expect, "Alien (1979)", "Alien (1979)")
        after_one = films_of(output)
        assert after_one != first_list and "Alien (1979)" not in after_one
        rate(page, output, expect, "lion king", "Lion King, The (1994)", stars_down=4)
        expect(output).to_contain_text("You rated Alien (1979): 5, Lion King, The (1994): 1")
        after_two = films_of(output)
        assert after_two != after_one and not {"Alien (1979)", "Lion King, The (1994)"} & set(after_two)
        picture(page, "widget_rated")

        text = output.get_by_placeholder("part of a title")
        text.fill("no film is called this")
        text.press("Enter")
        expect(output.locator("select")).to_contain_text("no such film")
        output.get_by_role("button", name="rate it").click()
        output.get_by_role("button", name="forget my ratings").click()
        expect(output).to_contain_text("User number 41")
        assert films_of(output) == first_list
        number = output.locator("input[type=number]")
        number.fill("7")
        number.press("Enter")
        expect(output).to_contain_text("User number 7")
        assert films_of(output) != first_list
    assert not seen.errors and not seen.elsewhere


def films_of(output) -> list[str]:
    cells = output.locator("table tr td:nth-child(2)").all_inner_texts()
    return [cell.replace("(new)", "").strip() for cell in cells]


def rate(page, output, expect, words: str, title: str, stars_down: int = 0) -> None:
    text = output.get_by_placeholder("part of a title")
    text.fill(words)
    text.press("Enter")
    expect(output.locator("select")).to_contain_text(title)
    output.locator("select").select_option(label=title)
    handle = output.locator(".noUi-handle")
    for _ in range(stars_down):
        handle.press("ArrowLeft")
    output.get_by_role("button", name="rate it").click()
    expect(output).to_contain_text(title + ":")
    expect(output).to_contain_text("(new)")
