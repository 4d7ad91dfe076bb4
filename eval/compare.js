for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener('click', event => {
    const first = event.currentTarget.dataset.better === 'higher' ? 'descending' : 'ascending';
    const other = first === 'ascending' ? 'descending' : 'ascending';
    const order = head.getAttribute('aria-sort') === first ? other : first;
    for (const each of heads) each.setAttribute('aria-sort', each === head ? order : 'none');
    const value = row => row.cells[column].dataset.value, sign = order === 'ascending' ? 1 : -1;
    const compare = (a, b) => column ? a - b : a.localeCompare(b);
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);      // without a value: last
      return sign * compare(x, y);
    });
    body.append(...rows);
  }));
}
