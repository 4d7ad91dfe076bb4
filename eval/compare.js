// --- table: a head's button sorts by its column; what has no value stays last -------------------------------------------
const spoken = document.querySelector('#sorted');
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
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return sign * compare(x, y);
    });
    body.append(...rows);
    spoken.textContent = 'sorted by ' + event.currentTarget.textContent + ', ' + order;
  }));
}

// --- plot ---------------------------------------------------------------------------------------------------------------
const points = document.querySelector('#points');
if (points) {
  const { columns, rows } = JSON.parse(points.textContent);
  const drawing = document.querySelector('#drawing'), [up, across] = ['#up', '#across'].map(id => document.querySelector(id));
  const family = row => row.label.replace(/@\d+$/, '');
  const families = [...new Set(rows.map(family))], colour = row => `var(--c${families.indexOf(family(row)) % 10})`;
  const add = (parent, name, attributes, text) => {
    const element = document.createElementNS('http:' + '//www.w3.org/2000/svg', name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return parent.appendChild(element);
  };
  const number = value => String(+value.toPrecision(4));
  const shorten = text => text.length > 36 ? text.slice(0, 15) + '…' + text.slice(-20) : text;

  for (const line of document.querySelectorAll('.sortable tbody tr')) {
    const row = rows.find(row => row.label === line.dataset.label && row.role === 'model' && !row.failed), dot = line.querySelector('.dot');
    if (!row) { dot.remove(); continue; }
    dot.style.borderColor = colour(row);
    if (!row.random) dot.style.background = colour(row);
  }

  const mark = (parent, row, x, y) => row.random
    ? add(parent, 'path', { d: `M${x} ${y - 6}l6 6l-6 6l-6 -6z`, fill: 'var(--card)', stroke: colour(row), 'stroke-width': 2, 'stroke-dasharray': '3 1.6', class: 'random' })
    : add(parent, 'circle', { cx: x, cy: y, r: 5.5, fill: colour(row), class: 'trained' });

  // ticks at 1, 2, 5 times powers of ten
  const ticks = (low, high, log, wanted) => {
    const found = [];
    if (log) {
      const decades = Math.log10(high / low), factors = decades > 3.5 ? [1] : decades > 1.6 ? [1, 3] : [1, 2, 5];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
        for (const factor of factors) found.push(factor * 10 ** power);
    } else {
      const raw = (high - low) / wanted, base = 10 ** Math.floor(Math.log10(raw));
      const step = [1, 2, 5, 10].map(factor => factor * base).find(size => size >= raw);
      for (let tick = Math.ceil(low / step); tick * step <= high; tick++) found.push(tick * step);
    }
    return found.filter(tick => tick >= low && tick <= high);
  };
  const scale = (values, from, to, mayLog) => {
    let low = Math.min(...values), high = Math.max(...values);
    const log = mayLog && low > 0 && high / low > 5;
    if (log) { const room = (high / low) ** 0.08; low /= room; high *= room; }
    else {
      const room = (high - low || Math.abs(high) || 1) * 0.1, positive = low >= 0;
      low -= room; high += room;
      if (positive) low = Math.max(0, low);
    }
    const share = log ? v => Math.log(v / low) / Math.log(high / low) : v => (v - low) / (high - low);
    return { low, high, log, at: v => from + share(v) * (to - from) };
  };

  const draw = () => {
    const [y, x] = [up.value, across.value], [columnY, columnX] = [y, x].map(name => columns.find(column => column.name === name));
    const has = (row, name) => row.values[name] !== undefined;
    const shown = rows.filter(row => has(row, x) && has(row, y)), flat = rows.filter(row => row.role !== 'model' && has(row, y) && !has(row, x));
    const width = Math.max(280, drawing.clientWidth), height = Math.max(280, Math.min(430, width * 0.55));
    const left = 62, right = width - 14, top = 14, bottom = height - 46;
    drawing.setAttribute('viewBox', `0 0 ${width} ${height}`);
    drawing.style.height = height + 'px';
    drawing.replaceChildren();
    const missing = rows.filter(row => row.role === 'model' && !shown.includes(row)).map(row => row.shown);
    document.querySelector('#undrawn').textContent = missing.length ? `Not drawn, without a value here: ${missing.join(', ')}.` : '';
    legend(shown, flat);
    drawing.setAttribute('aria-label', `${columnY.heading} against ${columnX.heading}. ` + shown.map(row =>
      `${row.shown}: ${number(row.values[y][0])} at ${number(row.values[x][0])}`).join('; '));
    if (!shown.length) { add(drawing, 'text', { x: left, y: height / 2, class: 'axis' }, 'no model has both'); return; }
    const spanned = [...shown, ...flat].flatMap(row => row.values[y].filter(value => value !== null));
    const h = scale(shown.map(row => row.values[x][0]), left, right, true), v = scale(spanned, bottom, top, false);
    for (const tick of ticks(v.low, v.high, v.log, Math.floor(height / 50))) {
      add(drawing, 'line', { x1: left, x2: right, y1: v.at(tick), y2: v.at(tick), class: 'grid' });
      add(drawing, 'text', { x: left - 7, y: v.at(tick) + 4, 'text-anchor': 'end', class: 'tick' }, number(tick));
    }
    for (const tick of ticks(h.low, h.high, h.log, Math.max(2, Math.floor(width / 110)))) {
      add(drawing, 'line', { x1: h.at(tick), x2: h.at(tick), y1: top, y2: bottom, class: 'grid' });
      add(drawing, 'text', { x: h.at(tick), y: bottom + 17, 'text-anchor': 'middle', class: 'tick' }, number(tick));
    }
    add(drawing, 'text', { x: (left + right) / 2, y: height - 8, 'text-anchor': 'middle', class: 'axis' }, columnX.heading + (h.log ? ' (logarithmic)' : ''));
    add(drawing, 'text', { x: 0, y: 0, transform: `translate(13 ${(top + bottom) / 2}) rotate(-90)`, 'text-anchor': 'middle', class: 'axis' }, columnY.heading);
    for (const name of families) {
      for (const random of [false, true]) {
        const joined = shown.filter(row => family(row) === name && row.random === random).sort((a, b) => a.values[x][0] - b.values[x][0]);
        if (joined.length > 1) add(drawing, 'path', { d: 'M' + joined.map(row => `${h.at(row.values[x][0])} ${v.at(row.values[y][0])}`).join('L'),
          fill: 'none', stroke: colour(joined[0]), 'stroke-width': 1.5, opacity: 0.6, ...(random ? { 'stroke-dasharray': '4 3' } : {}) });
      }
    }
    const taken = [];
    for (const row of flat) {
      const at = v.at(row.values[y][0]);
      add(drawing, 'line', { x1: left, x2: right, y1: at, y2: at, stroke: 'var(--soft)', 'stroke-dasharray': '6 4', class: 'flat' });
      write(row.shown, [[right - 4, at - 5, 'end'], [right - 4, at + 15, 'end'], [left + 4, at - 5, 'start']], taken, [left, right, top, bottom]);
    }
    for (const row of shown) {
      const [value, low, high] = row.values[y], at = h.at(row.values[x][0]), group = add(drawing, 'g', { 'data-label': row.label });
      if (low !== null && low !== undefined) {
        const d = `M${at} ${v.at(low)}V${v.at(high)}M${at - 4} ${v.at(low)}h8M${at - 4} ${v.at(high)}h8`;
        add(group, 'path', { d, stroke: colour(row), 'stroke-width': 1.5, fill: 'none', class: 'bar', ...(row.random ? { 'stroke-dasharray': '3 2' } : {}) });
      }
      mark(group, row, at, v.at(value));
      add(group, 'title', {}, `${row.shown}: ${columnY.title} ${number(value)} ${columnY.unit}, ${columnX.title} ${number(row.values[x][0])} ${columnX.unit}`);
      taken.push([at - 7, v.at(value) - 7, at + 7, v.at(value) + 7]);
    }
    for (const row of shown) {
      const [a, b] = [h.at(row.values[x][0]), v.at(row.values[y][0])];
      const places = [0, -16, 16, -32, 32, -48, 48].flatMap(d => [[a + 11, b + 4 + d, 'start'], [a - 11, b + 4 + d, 'end']]);
      write(shorten(row.label), [...places, [a, b - 14, 'middle'], [a, b + 24, 'middle']], taken, [left, right, top, bottom]);
    }
  };
  // the first place where a text covers nothing that is there already, inside the axes; else none: the legend names it
  const write = (text, places, taken, [left, right, top, bottom]) => {
    const element = add(drawing, 'text', { class: 'halo label' }, text), length = element.getComputedTextLength();
    for (const [x, y, anchor] of places) {
      const start = anchor === 'start' ? x : anchor === 'end' ? x - length : x - length / 2, box = [start, y - 12, start + length, y + 4];
      const inside = box[0] >= left && box[2] <= right && box[1] >= top - 8 && box[3] <= bottom + 2;
      if (inside && !taken.some(other => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3])) {
        for (const [key, value] of Object.entries({ x, y, 'text-anchor': anchor })) element.setAttribute(key, value);
        taken.push(box);
        return;
      }
    }
    element.remove();
  };
  const legend = (shown, flat) => {
    const list = document.querySelector('#legend');
    list.replaceChildren();
    for (const row of [...shown, ...flat]) {
      const item = list.appendChild(document.createElement('li')), sample = add(item, 'svg', { viewBox: '0 0 22 14', 'aria-hidden': 'true' });
      if (shown.includes(row)) mark(sample, row, 11, 7);
      else add(sample, 'line', { x1: 0, x2: 22, y1: 7, y2: 7, stroke: 'var(--soft)', 'stroke-dasharray': '6 4' });
      item.append(row.shown);
    }
  };
  up.addEventListener('change', draw);
  across.addEventListener('change', draw);
  new ResizeObserver(draw).observe(drawing.parentElement);
  draw();
}
