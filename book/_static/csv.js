// Each table can be taken away as CSV, made of what stands in it; a page can be cited.
document.addEventListener("DOMContentLoaded", () => {
  const text = (cell) => cell.textContent.trim().replace(/\s+/g, " ");
  const quoted = (value) => (/[",\n]/.test(value) ? `"${value.replace(/"/g, '""')}"` : value);
  const link = (label, file, content, type) => {
    const made = document.createElement("a");
    made.className = "take-away";
    made.textContent = label;
    made.download = file;
    made.href = URL.createObjectURL(new Blob([content], { type }));
    return made;
  };
  const page = location.pathname.split("/").pop().replace(/\.html$/, "") || "page";
  const tables = [...document.querySelectorAll("article table.dataframe")];
  tables.forEach((table, i) => {
    const lines = [...table.rows].map((row) =>
      [...row.cells].flatMap((cell) => [quoted(text(cell)), ...Array(cell.colSpan - 1).fill("")]).join(","),
    );
    const made = link("this table as CSV", `${page}-table-${i + 1}.csv`, lines.join("\n") + "\n", "text/csv");
    const fold = table.closest("details");
    const figure = table.closest("figure");
    const inSight = (figure ?? table).querySelectorAll("table.dataframe:not(details *)");
    if (!fold && inSight.length > 1) table.parentElement.after(made); // of several, each has its own below it
    else (fold ?? figure ?? table.parentElement).append(made);
  });
});
