// Rows of the table of groups are shown by name and format; without JavaScript all are there.
{
  const table = document.querySelector("#groups table");
  const form = document.querySelector(".filters");
  const [text, format, certainty] = ["text", "format", "certainty"].map(
    (name) => form.elements.namedItem(name));
  const count = form.querySelector("output");
  const rows = [...table.tBodies[0].rows];
  const show = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const name = row.cells[0].textContent.toLowerCase();
      const fits = words.every((word) => name.includes(word))
        && (!format.value || row.dataset.format === format.value)
        && (!certainty?.value || row.dataset.certainty === certainty.value);
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length} groups shown`;
  };
  form.hidden = false;
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(show));
  show();
}
// A button beside each command copies it; without JavaScript there is none.
for (const button of document.querySelectorAll(".copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const command = button.parentElement.querySelector("pre");
    try {
      await navigator.clipboard.writeText(command.textContent);
    } catch { // not allowed here: select it, so that the keyboard can copy it
      getSelection().selectAllChildren(command);
      button.textContent = "Selected";
      return;
    }
    button.textContent = "Copied";
    document.getElementById("sorted").textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}
