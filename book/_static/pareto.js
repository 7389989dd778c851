// Two sliders over models made from a dense one: which lose at most so many points of accuracy, at so many
// multiply-adds? The answer is a sentence; the plot below it shows all models, by mouse and by keyboard.
const LOWEST = 20; // points
document.addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll(".pareto")) draw(box);

  function draw(box) {
    const points = JSON.parse(box.dataset.points);
    // what loses more is drawn at the lower edge, so that the models that one would take lie apart
    const most = Math.min(LOWEST, Math.max(...points.map((p) => p.loss)));
    const widest = Math.max(100, ...points.map((p) => p.macs));
    const id = `pareto-${[...document.querySelectorAll(".pareto")].indexOf(box)}`;
    box.innerHTML = `
      <p><label for="${id}-loss">Accuracy that it may lose: <output></output> points</label>
        <input id="${id}-loss" type="range" min="0" max="${Math.ceil(most)}" step="0.1" value="${box.dataset.loss}"></p>
      <p><label for="${id}-macs">Multiply-adds that it may have: <output></output>% of the dense model's</label>
        <input id="${id}-macs" type="range" min="0" max="${Math.ceil(widest)}" step="0.1" value="${box.dataset.macs}"></p>
      <p class="answer" role="status"></p>
      <svg viewBox="0 0 640 330" role="group" aria-label="Models by multiply-adds and lost accuracy"></svg>
      <p class="told" role="status">Point at a model, or move through them with the Tab key.</p>`;
    const [loss, macs] = box.querySelectorAll("input");
    const svg = box.querySelector("svg");
    const x = (value) => 50 + (570 * value) / widest;
    const y = (value) => 20 + (260 * Math.min(Math.max(value, 0), most)) / most;
    const part = (name, attributes, text = "") => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
      made.textContent = text;
      svg.append(made);
      return made;
    };
    const allowed = part("rect", { class: "allowed", x: x(0), y: 20 });
    for (const value of [0, 25, 50, 75, 100]) part("text", { x: x(value), y: 298, "text-anchor": "middle" }, `${value}%`);
    part("text", { x: 335, y: 320, "text-anchor": "middle" }, "multiply-adds, of the dense model's");
    for (let value = 0; value <= most; value += Math.max(1, Math.round(most / 5)))
      part("text", { x: 42, y: y(value) + 4, "text-anchor": "end" }, value ? `−${value}` : "0");
    part("text", { x: 4, y: 12 }, `points of accuracy (−${most.toFixed(0)}: or worse)`);
    const marks = points.map((p) => {
      const mark = part("circle", { cx: x(p.macs), cy: y(p.loss), r: 5, tabindex: 0, role: "img", "aria-label": said(p) });
      const tell = () => (box.querySelector(".told").textContent = `${said(p)}.`);
      mark.addEventListener("mouseenter", tell);
      mark.addEventListener("focus", tell);
      return mark;
    });

    function said(p) {
      const interval = p.low === null ? "" : ` [${p.low.toFixed(1)}, ${p.high.toFixed(1)}]`;
      return `${p.name}: loses ${p.loss.toFixed(1)}${interval} points (n=${p.n}) at ${p.macs.toFixed(0)}% of the multiply-adds and ${p.stored.toFixed(0)}% of the stored parameters`;
    }

    function update() {
      const [outLoss, outMacs] = box.querySelectorAll("output");
      outLoss.textContent = Number(loss.value).toFixed(1);
      outMacs.textContent = Number(macs.value).toFixed(0);
      const fits = points.filter((p) => p.loss <= loss.value && p.macs <= macs.value);
      const best = fits.sort((a, b) => a.loss - b.loss)[0];
      // what is missing by the smallest share of either wish
      const away = (p) => Math.max(p.loss - loss.value, 0) / Math.max(most, 1) + Math.max(p.macs - macs.value, 0) / widest;
      const nearest = [...points].sort((a, b) => away(a) - away(b))[0];
      box.querySelector(".answer").textContent = best
        ? `${fits.length} of ${points.length} models do. The best of them is ${said(best)}.`
        : `None of the ${points.length} models does. The nearest is ${said(nearest)}.`;
      allowed.setAttribute("width", x(Number(macs.value)) - x(0));
      allowed.setAttribute("height", y(Number(loss.value)) - 20);
      marks.forEach((mark, i) => mark.setAttribute("class", fits.includes(points[i]) ? "fits" : "out"));
    }
    loss.addEventListener("input", update);
    macs.addEventListener("input", update);
    update();
  }
});
