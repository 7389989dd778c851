// Buttons beside the citations of a page: press one, and the text lies in the clipboard.
document.addEventListener("DOMContentLoaded", () => {
  // browsers that give no clipboard to a page opened as a file copy what is selected
  function select(part) {
    const range = document.createRange();
    range.selectNodeContents(part);
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
  }

  async function copy(part) {
    try {
      await navigator.clipboard.writeText(part.textContent);
      return true;
    } catch {
      select(part);
      return document.execCommand("copy");
    }
  }

  for (const box of document.querySelectorAll(".cite .copied-whole")) {
    const part = box.firstElementChild;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "btn btn-sm btn-outline-secondary copy-cite";
    button.textContent = part.matches("pre") ? "Copy BibTeX" : "Copy text";
    const told = document.createElement("span");
    told.setAttribute("role", "status");
    button.addEventListener("click", async () => {
      told.textContent = (await copy(part)) ? "Copied." : "Selected: copy it with your keyboard.";
    });
    box.append(button, told);
  }
});
