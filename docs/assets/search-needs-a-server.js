// A browser does not start the search of a page that was opened as a file. The theme then hides the search field.
if (location.protocol === "file:") {
  const hint = document.createElement("p");
  hint.className = "search-hint";
  hint.textContent = "To search: make docs-serve";
  document.querySelector(".md-search").after(hint);
  document.querySelector(".md-header__button[for=__search]").remove();
}
