// Which expert does each patch go to? A slider for the block, arrows for the image, and each patch tells its expert
// under the mouse or the arrow keys. The static figure above has the first images.
document.addEventListener("DOMContentLoaded", () => {
  for (const [number, box] of [...document.querySelectorAll(".routing")].entries()) explore(box, number);

  function explore(box, number) {
    const data = JSON.parse(box.dataset.content);
    if (!data.names.length) return;
    const [rows, columns] = data.grid;
    const side = 28;
    const state = { image: 0, layer: data.blocks.length - 1, patch: 0 };
    const option = (name, i) => `<option value="${i}"></option>`;
    box.innerHTML = `
      <p><label for="routing-${number}-image">Image</label>
        <select id="routing-${number}-image">${data.names.map(option).join("")}</select>
        <label for="routing-${number}-block">Block <output></output></label>
        <input id="routing-${number}-block" type="range" min="0" max="${data.blocks.length - 1}" value="${state.layer}"></p>
      <svg viewBox="0 0 ${columns * side} ${rows * side}" tabindex="0" role="application"
        aria-label="Patches of the image with the expert of each: move with the arrow keys"></svg>
      <p class="told" role="status"></p>`;
    const [select, slider] = [box.querySelector("select"), box.querySelector("input")];
    [...select.options].forEach((entry, i) => (entry.textContent = data.names[i]));
    const svg = box.querySelector("svg");
    const made = (name, attributes) => {
      const node = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
      svg.append(node);
      return node;
    };
    const picture = made("image", { width: columns * side, height: rows * side, preserveAspectRatio: "none" });
    const patches = Array.from({ length: rows * columns }, (_, i) => {
      const at = { x: (i % columns) * side, y: Math.floor(i / columns) * side };
      const tile = made("rect", { ...at, width: side, height: side });
      const text = made("text", { x: at.x + side / 2, y: at.y + side / 2 + 4, "text-anchor": "middle" });
      tile.addEventListener("mouseenter", () => point(i));
      return { tile, text };
    });

    function experts() {
      return data.experts[state.layer][state.image];
    }
    function point(patch) {
      patches[state.patch].tile.classList.remove("here");
      state.patch = patch;
      patches[patch].tile.classList.add("here");
      const expert = experts()[patch];
      const [row, column] = [Math.floor(patch / columns) + 1, (patch % columns) + 1];
      const alike = experts().filter((e) => e === expert).length;
      const block = `block ${data.blocks[state.layer]}`;
      box.querySelector(".told").textContent =
        expert < 0
          ? `Patch in row ${row}, column ${column}: no expert takes it in ${block}.`
          : `Patch in row ${row}, column ${column}: expert ${expert + 1} in ${block}, which takes ${alike} of these ${experts().length} patches.`;
    }
    function show() {
      box.querySelector("output").textContent = data.blocks[state.layer];
      const image = data.images[state.image];
      if (image) picture.setAttribute("href", image);
      experts().forEach((expert, i) => {
        const { tile, text } = patches[i];
        tile.setAttribute("fill", expert < 0 ? "none" : data.colours[expert]);
        tile.setAttribute("fill-opacity", image ? 0.6 : 1);
        text.setAttribute("fill", expert < 0 ? "currentColor" : data.ink[expert]);
        text.textContent = expert < 0 ? "–" : expert + 1;
      });
      point(state.patch);
    }
    select.addEventListener("change", () => ((state.image = Number(select.value)), show()));
    slider.addEventListener("input", () => ((state.layer = Number(slider.value)), show()));
    svg.addEventListener("keydown", (event) => {
      const [row, column] = [Math.floor(state.patch / columns), state.patch % columns];
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      const move = moves[event.key];
      if (!move) return;
      event.preventDefault();
      const [r, c] = [row + move[0], column + move[1]];
      if (r >= 0 && r < rows && c >= 0 && c < columns) point(r * columns + c);
    });
    show();
  }
});
