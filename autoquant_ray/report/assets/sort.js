"use strict";
// Column heads become buttons that sort; without JavaScript they stay plain heads.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const isNumber = head.classList.contains("number");
      const before = head.getAttribute("aria-sort");
      const order = before === "ascending" ? "descending" : "ascending";
      const sign = order === "ascending" ? 1 : -1;
      const keyOf = (row) => {
        const data = row.cells[column].dataset;
        return isNumber ? data.number : data.key;
      };
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [keyOf(a), keyOf(b)];
        if (x === "" || y === "") return (x === "") - (y === ""); // without a value: last
        return sign * (isNumber ? x - y : x.localeCompare(y, undefined, { numeric: true }));
      });
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      body.append(...rows);
      document.getElementById("sorted").textContent =
        `${table.caption.textContent.split(",")[0]}: sorted by ${button.textContent}, ${order}`;
    });
  });
}
