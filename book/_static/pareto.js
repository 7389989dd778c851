// Two sliders over models made from a dense one: which lose at most so many points of accuracy, at so many
// multiply-adds, or in so much measured time? The answer is a sentence; the plot below it shows all models
// whose cost is known, by mouse and by keyboard.
const LOWEST = 20; // points
const [TOP, BOTTOM, LEFT] = [30, 290, 44]; // of the plot, in CSS pixels
const COSTS = {
  macs: { title: "Multiply-adds", within: "of the multiply-adds", axis: "multiply-adds" },
  time: { title: "Measured time", within: "of the time", axis: "measured time" },
};
document.addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll(".pareto")) draw(box, "macs", box.dataset.loss, box.dataset.cost);

  // wishes: what the sliders begin at, points of accuracy and percent of the dense model's cost
  function draw(box, cost, lossWish, costWish) {
    const all = JSON.parse(box.dataset.points);
    const points = all.filter((p) => p[cost] !== null).sort((a, b) => a[cost] - b[cost] || a.loss - b.loss || a.stored - b.stored);
    const timed = all.filter((p) => p.time !== null).length;
    // what loses more is drawn at the lower edge, so that the models that one would take lie apart
    const most = Math.min(LOWEST, Math.max(...points.map((p) => p.loss)));
    const widest = Math.max(100, ...points.map((p) => p[cost]));
    const width = Math.min(Math.max(box.clientWidth || 640, 320), 640); // letters keep their size on a phone
    const id = `pareto-${[...document.querySelectorAll(".pareto")].indexOf(box)}`;
    const choice = (key, told) => `<label><input type="radio" name="${id}" value="${key}" ${key === cost ? "checked" : ""}> ${told}</label>`;
    const costs = `<fieldset><legend>Cost of a model</legend>${choice("macs", "multiply-adds")} ${choice("time", `measured time (${timed} of ${all.length} models; ${box.dataset.timed}, alone on a processor)`)}</fieldset>`;
    box.innerHTML = `
      ${timed ? costs : ""}
      <p><label for="${id}-loss">Loss of accuracy, at most: <output></output> points</label>
        <input id="${id}-loss" type="range" min="0" max="${Math.ceil(most)}" step="0.1" value="${lossWish}"></p>
      <p><label for="${id}-cost">${COSTS[cost].title}, at most: <output></output>% of the dense model's</label>
        <input id="${id}-cost" type="range" min="0" max="${Math.ceil(widest)}" step="0.1" value="${costWish}"></p>
      <p class="answer" role="status"></p>
      <svg viewBox="0 0 ${width} 336" role="group" aria-label="Models by ${COSTS[cost].axis} and lost accuracy"></svg>
      <p class="told" role="status">Point at a model, or reach them with the Tab key and go through them with the arrow keys.</p>`;
    const [loss, price] = box.querySelectorAll("input[type=range]");
    const svg = box.querySelector("svg");
    const x = (value) => LEFT + ((width - LEFT - 22) * value) / widest;
    const y = (value) => TOP + ((BOTTOM - TOP) * Math.min(Math.max(value, 0), most)) / most;
    const part = (name, attributes, text = "") => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
      made.textContent = text;
      svg.append(made);
      return made;
    };
    const allowed = part("rect", { class: "allowed", x: x(0), y: TOP });
    const line = (x1, y1, x2, y2) => part("line", { x1, y1, x2, y2 });
    for (const value of [0, 25, 50, 75, 100]) {
      line(x(value), TOP, x(value), BOTTOM);
      part("text", { x: x(value), y: BOTTOM + 18, "text-anchor": "middle" }, `${value}%`);
    }
    part("text", { x: x(widest / 2), y: BOTTOM + 38, "text-anchor": "middle" }, `${COSTS[cost].axis}, of the dense model's`);
    const step = Math.max(1, Math.round(most / 5));
    for (let value = 0; value <= most; value += step) {
      line(x(0), y(value), x(widest), y(value));
      const last = value + step > most && points.some((p) => p.loss > most);
      part("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, value ? `${last ? "≤" : ""}−${value}` : "0");
    }
    part("text", { x: 2, y: 14 }, "change of accuracy (points)");
    const marks = points.map((p, i) => {
      const at = { cx: x(p[cost]), cy: y(p.loss), r: 5 };
      const mark = part("circle", { ...at, tabindex: i ? -1 : 0, role: "img", "aria-label": said(p) });
      const tell = () => (box.querySelector(".told").textContent = `${said(p)}.`);
      mark.addEventListener("mouseenter", tell);
      mark.addEventListener("focus", tell);
      return mark;
    });
    // one stop of the Tab key for all models; the arrow keys go on from there
    svg.addEventListener("keydown", (event) => {
      const way = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const here = marks.indexOf(document.activeElement);
      if (!way || here < 0) return;
      event.preventDefault();
      const next = marks[Math.min(Math.max(here + way, 0), marks.length - 1)];
      marks[here].tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });

    function said(p) {
      const interval = p.low === null ? "" : ` [${p.low.toFixed(1)}, ${p.high.toFixed(1)}]`;
      return `${p.name}: loses ${p.loss.toFixed(1)}${interval} points (n=${p.n}) at ${p[cost].toFixed(1)}% ${COSTS[cost].within} and ${p.stored.toFixed(1)}% of the stored parameters`;
    }

    function doubt(p) {
      if (p.low === null) return "; below three seeds it has no interval";
      return p.high > loss.value ? `; its interval does not exclude a loss of more than ${Number(loss.value).toFixed(1)} points` : "";
    }

    function update() {
      const [outLoss, outPrice] = box.querySelectorAll("output");
      outLoss.textContent = Number(loss.value).toFixed(1);
      outPrice.textContent = Number(price.value).toFixed(1);
      const fits = points.filter((p) => p.loss <= loss.value && p[cost] <= price.value);
      const best = [...fits].sort((a, b) => a.loss - b.loss)[0];
      // what is missing by the smallest share of either wish
      const away = (p) => Math.max(p.loss - loss.value, 0) / Math.max(most, 1) + Math.max(p[cost] - price.value, 0) / widest;
      const nearest = [...points].sort((a, b) => away(a) - away(b))[0];
      const both = `at most ${outLoss.textContent} points at ${outPrice.textContent}% ${COSTS[cost].within} or less (${box.dataset.images})`;
      const number = `${fits.length || "None"} of the ${points.length} models ${fits.length > 1 ? "lose" : "loses"} ${both}`;
      box.querySelector(".answer").textContent = best
        ? `${number}. The one that loses least is ${said(best)}${doubt(best)}.`
        : `${number}. The nearest is ${said(nearest)}.`;
      allowed.setAttribute("width", x(Number(price.value)) - x(0));
      allowed.setAttribute("height", y(Number(loss.value)) - TOP);
      marks.forEach((mark, i) => mark.setAttribute("class", fits.includes(points[i]) ? "fits" : "out"));
    }
    loss.addEventListener("input", update);
    price.addEventListener("input", update);
    for (const radio of box.querySelectorAll("input[type=radio]"))
      radio.addEventListener("change", () => {
        draw(box, radio.value, loss.value, price.value);
        box.querySelector("input[type=radio]:checked").focus(); // the one that had it is gone with the old plot
      });
    update();
  }
});
