for (const viewer of document.querySelectorAll('.viewer')) {
  const cards = viewer.parentElement.querySelector('.cards');
  const stack = viewer.querySelector('.stack'), [under, over] = stack.querySelectorAll('img');
  const [left, right] = viewer.querySelectorAll('select'), range = viewer.querySelector('input'), values = viewer.querySelector('.values');
  let chosen = cards.querySelector('button');
  const show = () => {
    const source = kind => chosen.querySelector('img[data-kind="' + kind + '"]');
    under.src = source(left.value).src; under.alt = left.value;
    over.src = source(right.value).src; over.alt = right.value;
    values.textContent = chosen.dataset.values;
    for (const card of cards.children) card.setAttribute('aria-pressed', card === chosen);
  };
  const cut = () => stack.style.setProperty('--cut', range.value + '%');
  for (const card of cards.children) card.addEventListener('click', () => { chosen = card; show(); });
  left.addEventListener('change', show); right.addEventListener('change', show); range.addEventListener('input', cut);
  stack.addEventListener('pointermove', event => {
    if (event.pointerType === 'touch' || event.buttons) {
      const box = stack.getBoundingClientRect();
      range.value = 100 * (event.clientX - box.left) / box.width; cut();
    }
  });
  show(); cut();
}
const players = [...document.querySelectorAll('.sound audio')];
for (const player of players) {
  const mel = player.parentElement.querySelector('.mel'), line = mel.querySelector('i');
  const share = name => parseFloat(getComputedStyle(mel).getPropertyValue(name)) / 100;
  const follow = () => {
    line.style.setProperty('--at', player.currentTime / player.duration || 0);
    line.classList.toggle('on', player.currentTime > 0);
    if (!player.paused) requestAnimationFrame(follow);
  };
  for (const event of ['play', 'pause', 'timeupdate', 'seeked']) player.addEventListener(event, follow);
  player.addEventListener('play', () => { for (const other of players) if (other !== player) other.pause(); });
  mel.addEventListener('click', event => {
    const box = mel.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width - share('--left')) / share('--width');
    player.currentTime = Math.min(Math.max(at, 0), 1) * player.duration;
    player.play().catch(() => {});      // a browser may want to see a click on the page first
  });
}
document.documentElement.dataset.ready = 'yes';
