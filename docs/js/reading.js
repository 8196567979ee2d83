/* What the theme leaves unsaid to those who hear a page, or go through it with the keyboard. */
function say() {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  document.querySelectorAll(".md-code__nav").forEach((beside, number) => {
    beside.setAttribute("aria-label", `Code ${number + 1}`);
  });
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap")) {
    table.tabIndex = table.scrollWidth > table.clientWidth ? 0 : -1;
  }
}

// The theme adds both as it goes.
new MutationObserver(say).observe(document.body, { childList: true, subtree: true });
addEventListener("resize", say);
say();
