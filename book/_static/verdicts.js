// Filters the tables of verdicts by study, verdict and text. What is chosen stands in the address, so
// that it can be linked to; without JavaScript the tables are whole and the studies unfold.
document.addEventListener("DOMContentLoaded", () => {
  const bar = document.getElementById("verdict-filter");
  if (!bar) return;
  const offered = JSON.parse(bar.dataset.offered);
  const rows = [...document.querySelectorAll("tr.claim")];
  const folds = [...document.querySelectorAll("details.study")];
  const text = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const chosen = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

  const line = (name, values) => {
    const row = document.createElement("div");
    row.className = "line";
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", name);
    row.innerHTML = `<span>${name}</span>`;
    bar.append(row);
    for (const [value, label] of values) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = label;
      button.dataset.name = name.toLowerCase();
      button.dataset.value = value;
      button.addEventListener("click", () => {
        const key = button.dataset.name;
        chosen[key] = chosen[key] === value ? "" : value;
        apply();
      });
      row.append(button);
    }
  };
  line("Study", Object.entries(offered.studies));
  line("Verdict", offered.verdicts.map((word) => [word, word]));
  const last = document.createElement("div");
  last.className = "line";
  last.innerHTML =
    '<span><label for="verdict-text">Text</label></span><input id="verdict-text" type="search">' +
    '<span id="verdict-count" role="status"></span>';
  bar.append(last);
  const input = last.querySelector("input");
  input.value = chosen.text || "";
  input.addEventListener("input", () => {
    chosen.text = input.value;
    apply();
  });

  function fits(row) {
    return (
      (!chosen.study || row.dataset.study === chosen.study) &&
      (!chosen.verdict || row.dataset.verdict.split("; ").includes(chosen.verdict)) &&
      (!chosen.text || text.get(row).includes(chosen.text.toLowerCase()))
    );
  }

  function apply() {
    const given = Object.entries(chosen).filter(([, value]) => value);
    let count = 0;
    for (const row of rows) {
      row.hidden = !fits(row);
      count += !row.hidden;
    }
    for (const fold of folds) {
      const some = fold.querySelector("tr.claim:not([hidden])") !== null;
      fold.hidden = !some;
      fold.open = given.length > 0 && some;
    }
    for (const button of bar.querySelectorAll("button")) {
      const pressed = chosen[button.dataset.name] === button.dataset.value;
      button.setAttribute("aria-pressed", String(pressed));
    }
    document.getElementById("verdict-count").textContent = `${count} of ${rows.length} claims and controls`;
    const state = new URLSearchParams(given).toString();
    if (given.length || location.hash.includes("=")) {
      history.replaceState(null, "", location.pathname + location.search + (state && `#${state}`));
    }
  }

  bar.hidden = false;
  // a link to a claim opens what it is folded in
  const unfold = () => {
    const target = location.hash.startsWith("#claim-") && document.getElementById(location.hash.slice(1));
    for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    if (target) target.scrollIntoView();
  };
  for (const key of Object.keys(chosen)) if (!["study", "verdict", "text"].includes(key)) delete chosen[key];
  apply();
  unfold();
  window.addEventListener("hashchange", unfold);
});
