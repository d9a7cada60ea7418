// A browser does not start the search of a page that was opened as a file. Say so in the search field.
if (location.protocol === "file:") {
  for (const input of document.querySelectorAll(".md-search__input")) {
    input.disabled = true;
    input.placeholder = "To search: make docs-serve";
  }
}
