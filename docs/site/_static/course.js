/* What the theme leaves to the mouse works with a keyboard and has a name; the search works on pages opened as files. */

// excerpts of the results are fetched, which a browser refuses to a file
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

const NAMES = { __navigation: "list of pages", __toc: "contents of this page" };

document.addEventListener("DOMContentLoaded", () => {
  for (const label of document.querySelectorAll("label[for]")) {
    if (label.innerText.trim() || label.classList.contains("overlay")) continue;
    label.setAttribute("role", "button");
    label.setAttribute("tabindex", "0");
    label.setAttribute("aria-label", `Show or hide: ${NAMES[label.htmlFor] ?? "pages below"}`);
    label.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      label.click();
    });
  }
  // wide code and tables scroll by themselves: let the arrow keys do it
  for (const box of document.querySelectorAll("div.highlight pre, article table, div.cell_output")) {
    if (box.scrollWidth > box.clientWidth) box.setAttribute("tabindex", "0");
  }
});
