// The switch for code, and boxes that scroll sideways. Without this script code stays hidden and
// the boxes scroll all the same.
(() => {
  const root = document.documentElement;
  const kept = {  // storage is shut off in some browsers when a page is opened as a file
    read: () => { try { return localStorage.getItem("code"); } catch { return null; } },
    write: value => { try { localStorage.setItem("code", value); } catch { /* this page only */ } },
  };
  root.dataset.code = kept.read() === "shown" ? "shown" : "hidden";

  const overflows = box => box.scrollWidth > box.clientWidth + 1;

  function addSwitch() {
    const bar = document.querySelector(".article-header-buttons");
    if (!bar || !document.querySelector(".cell > .cell_input")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "btn btn-sm code-switch";
    button.title = "Show the code that made this page";
    button.innerHTML = '<span aria-hidden="true">&lt;/&gt;</span><span>Code</span>';
    const tell = () => {
      button.setAttribute("aria-pressed", String(root.dataset.code === "shown"));
      for (const pre of document.querySelectorAll(".cell_input pre"))  // long lines scroll by keys
        if (overflows(pre)) pre.tabIndex = 0;
    };
    button.addEventListener("click", () => {
      const top = button.getBoundingClientRect().top;
      const anchor = [...document.querySelectorAll(".bd-article :is(h1, h2, h3, p, figure)")].find(
        part => part.getBoundingClientRect().top > top);
      const before = anchor?.getBoundingClientRect().top;
      root.dataset.code = root.dataset.code === "shown" ? "hidden" : "shown";
      if (anchor) {  // what was read stays where it was
        const moved = anchor.getBoundingClientRect().top - before;
        window.scrollBy({top: moved, behavior: "instant"});
      }
      kept.write(root.dataset.code);
      tell();
    });
    tell();
    bar.prepend(button);
  }

  const NARROW = 992;  // CSS pixels; below, the theme leaves no margin
  const BOXES = ".bd-article :is(.pst-scrollable-table-container, div:has(> table)," +
    " div:has(> img), div.math > mjx-container)";

  function nameOf(box) {
    const figure = box.closest("figure");
    const caption = figure?.querySelector("figcaption") ?? box.querySelector("caption");
    const section = box.closest("section")?.querySelector("h1, h2, h3, h4");
    const text = (caption ?? section)?.textContent.replace(/#$/, "").trim() ?? "";
    const kind = box.matches("mjx-container") ? "Formula" : "Table";
    return `${text.slice(0, 80) || kind} (scrolls sideways)`;
  }

  // the width from the box's left edge to the end of the column of contents, in pixels
  function widest(box) {
    const main = document.querySelector(".bd-main").getBoundingClientRect();
    return Math.floor(main.right - 16 - box.getBoundingClientRect().left);
  }

  function widen(box) {
    const table = box.querySelector(":scope > table");
    const output = box.closest(".output") ?? box;
    if (!table || !overflows(box)) return;
    if (window.innerWidth < NARROW) {
      const names = [...(table.tHead?.rows[0]?.cells ?? [])].map(cell => cell.textContent.trim());
      table.classList.add("sticks");
      const bySource = names[0] === "source";  // then the second column names the row
      table.classList.toggle("by-source", bySource);
      table.classList.toggle("claims", bySource && names[1] === "claim");
      breakNames(table.querySelectorAll("td:nth-child(-n+2), td:nth-child(-n+2) *"));
      return;
    }
    output.style.setProperty("--wide", `${widest(output)}px`);
    output.classList.add("wide");
    // the theme folds the contents away beside this class, and fails where there are none
    if (document.querySelector(".bd-sidebar-secondary")) output.classList.add("full-width");
    for (const last of ["small", "wraps"]) if (overflows(box)) table.classList.add(last);
    if (overflows(box)) breakNames(table.querySelectorAll("thead th"));
  }

  // lets names such as router_norm_change or vimoe/cost break behind an underscore or a slash
  function breakNames(cells) {
    for (const cell of cells) {
      const parts = cell.textContent.split(/(?<=[_/])/);
      if (cell.childElementCount || parts.length < 2) continue;
      cell.replaceChildren(...parts.flatMap(part => [part, document.createElement("wbr")]));
    }
  }

  function mark(box) {
    const more = overflows(box);
    const left = box.scrollLeft;
    box.classList.toggle("more-left", more && left > 1);
    box.classList.toggle("more-right", more && left + box.clientWidth < box.scrollWidth - 1);
    if (more === box.classList.contains("scrolls")) return;
    box.classList.toggle("scrolls", more);
    if (!more) {
      if (box.previousElementSibling?.matches(".scroll-hint")) box.previousElementSibling.remove();
      for (const name of ["tabindex", "role", "aria-label"]) box.removeAttribute(name);
      return;
    }
    box.tabIndex = 0;
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", nameOf(box));
    const hint = document.createElement("div");
    hint.className = "scroll-hint";
    hint.setAttribute("aria-hidden", "true");  // the label says it
    hint.textContent = "more to the right: scroll sideways →";
    box.before(hint);
  }

  function fit() {
    const boxes = [...document.querySelectorAll(BOXES)];
    for (const part of document.querySelectorAll(".bd-article :is(.wide, .small, .wraps, .sticks)"))
      part.classList.remove("wide", "full-width", "small", "wraps", "sticks");
    boxes.forEach(widen);
    boxes.forEach(mark);
  }

  document.addEventListener("DOMContentLoaded", () => {
    addSwitch();
    fit();
    document.addEventListener("scroll", event => {
      if (event.target.classList?.contains("scrolls")) mark(event.target);
    }, true);
    document.addEventListener("toggle", fit, true);  // a folded part has no width until it opens
    window.addEventListener("resize", fit);
    document.addEventListener("click", event => {  // the theme takes the focus away from its switch
      event.target.closest(".theme-switch-button, .sidebar-toggle")?.focus();
    });
    window.addEventListener("load", () => window.MathJax?.startup?.promise?.then(fit) ?? fit());
  });
})();
