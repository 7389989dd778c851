// Before a page goes to paper: the theme is light, what is folded is opened but for what this build ran, and a wide table
// becomes smaller, or breaks its lines where it would become too small. Afterwards the page is as it was.
(() => {
  const PAPER = 676; // CSS pixels between the margins of print.css: 210 mm less two of 15 mm, rounded down
  const SMALLER = 0.75; // a table shrinks this far before its lines break
  const FOLDS = ".bd-article details:not([open], .above-input, table details)"; // cells of a table stay as they are
  const BUILD = /^(what )?this build/i; // what is folded because it is no evidence stays away, unless a reader opened it
  let undo = [];

  const style = (element, values) => {
    for (const [name, value] of Object.entries(values)) element.style.setProperty(name, value, "important");
  };

  function fit(table) {
    const before = table.style.cssText;
    undo.push(() => (table.style.cssText = before));
    style(table, { width: "min-content", "max-width": "none" });
    const breaks = table.offsetWidth > PAPER / SMALLER;
    if (breaks) style(table, { "white-space": "normal" });
    const width = table.offsetWidth;
    if (width > PAPER) return style(table, { zoom: PAPER / width });
    table.style.cssText = before;
    if (breaks) style(table, { "white-space": "normal" });
  }

  // from a folder of this computer, links to other pages would lead nobody else anywhere
  function unlink(link) {
    const href = link.getAttribute("href");
    if (href.startsWith("#") || /^[a-z]+:/.test(href)) return;
    link.removeAttribute("href");
    undo.push(() => link.setAttribute("href", href));
  }

  function prepare() {
    const root = document.documentElement;
    const { theme } = root.dataset;
    root.dataset.theme = "light"; // paper is white
    root.classList.add("on-paper");
    undo.push(() => {
      root.classList.remove("on-paper");
      root.dataset.theme = theme;
    });
    for (const fold of document.querySelectorAll(FOLDS)) {
      const isOfBuild = BUILD.test(fold.querySelector("summary")?.textContent.trim());
      if (isOfBuild) fold.classList.add("noprint");
      else fold.open = true;
      undo.push(() => (isOfBuild ? fold.classList.remove("noprint") : (fold.open = false)));
    }
    document.querySelectorAll(".bd-article table:not(table table)").forEach(fit);
    if (location.protocol === "file:") document.querySelectorAll(".bd-article a[href]").forEach(unlink);
  }

  function restore() {
    for (const step of undo.reverse()) step();
    undo = [];
  }

  window.addEventListener("beforeprint", prepare);
  window.addEventListener("afterprint", restore);
})();
