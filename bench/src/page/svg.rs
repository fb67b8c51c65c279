//! The three kinds of drawing, as SVG with nothing outside of it.

use std::fmt::Write as _;

use super::escape;

const WIDTH: f64 = 960.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 220.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 34.0;
/// Distinguishable on white, also without red or green.
const COLOURS: [&str; 10] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#444444", "#8f4bd8", "#999999",
    "#e31a1c",
];

fn colour(at: usize) -> &'static str {
    COLOURS[at % COLOURS.len()]
}

/// A drawing area whose axes map values to pixels.
struct Area {
    svg: String,
    height: f64,
}

impl Area {
    fn new(height: f64) -> Self {
        let svg = format!(
            "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' font-family='sans-serif' font-size='12' role='img'>\
             <rect width='{WIDTH}' height='{height}' fill='#fff'/>"
        );
        Self { svg, height }
    }

    fn inner_width() -> f64 {
        WIDTH - LEFT - RIGHT
    }

    fn inner_height(&self) -> f64 {
        self.height - TOP - BOTTOM
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let text = escape(text);
        write!(self.svg, "<text x='{x:.1}' y='{y:.1}' text-anchor='{anchor}' fill='#333'>{text}</text>")
            .expect("strings take all");
    }

    fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), stroke: &str) {
        write!(self.svg, "<line x1='{x1:.1}' y1='{y1:.1}' x2='{x2:.1}' y2='{y2:.1}' stroke='{stroke}'/>")
            .expect("strings take all");
    }

    fn path(&mut self, points: &[(f64, f64)], stroke: &str) {
        let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        write!(
            self.svg,
            "<polyline points='{}' fill='none' stroke='{stroke}' stroke-width='2'/>",
            points.join(" ")
        )
        .expect("strings take all");
    }

    fn vertical(&mut self, x: f64, label: &str) {
        let bottom = self.height - BOTTOM;
        self.line((x, TOP), (x, bottom), "#e5e5e5");
        self.text(x, bottom + 16.0, "middle", label);
    }

    fn horizontal(&mut self, y: f64, label: &str) {
        self.line((LEFT, y), (WIDTH - RIGHT, y), "#e5e5e5");
        self.text(LEFT - 6.0, y + 4.0, "end", label);
    }

    fn legend(&mut self, at: usize, label: &str) {
        let (x, y) = (WIDTH - RIGHT + 14.0, TOP + 12.0 + at as f64 * 17.0);
        write!(self.svg, "<rect x='{x}' y='{}' width='10' height='10' fill='{}'/>", y - 9.0, colour(at))
            .expect("strings take all");
        self.text(x + 15.0, y, "start", label);
    }

    fn end(self) -> String {
        self.svg + "</svg>"
    }
}

/// Cumulative distributions over a logarithmic axis of milliseconds.
pub struct Cdf {
    /// Names and sorted samples.
    pub lines: Vec<(String, Vec<f64>)>,
}

impl Cdf {
    /// The drawing.
    pub fn draw(&self) -> String {
        let mut area = Area::new((self.lines.len() as f64 * 17.0 + 60.0).max(320.0));
        let all = || self.lines.iter().flat_map(|(_, values)| values.iter().copied());
        let low = all().fold(f64::INFINITY, f64::min).max(1e-3).log10().floor();
        let high = all().fold(0.0, f64::max).max(1e-2).log10().ceil().max(low + 1.0);
        let x = |value: f64| LEFT + (value.max(1e-3).log10() - low) / (high - low) * Area::inner_width();
        let inner = area.inner_height();
        let y = |share: f64| TOP + (1.0 - share) * inner;
        for decade in low as i32..=high as i32 {
            for step in [1.0, 2.0, 5.0] {
                let value = step * 10_f64.powi(decade);
                if value <= 10_f64.powf(high) * 1.001 {
                    area.vertical(x(value), &label(value));
                }
            }
        }
        area.text(WIDTH - RIGHT, area.height - 4.0, "end", "milliseconds");
        for share in [0.0, 0.25, 0.5, 0.75, 0.99] {
            area.horizontal(y(share), &format!("{:.0} %", share * 100.0));
        }
        for (at, (name, values)) in self.lines.iter().enumerate() {
            let mut points = vec![(x(values[0]), y(0.0))];
            let share = |rank: usize| (rank + 1) as f64 / values.len() as f64;
            points.extend(values.iter().enumerate().map(|(rank, &value)| (x(value), y(share(rank)))));
            area.path(&points, colour(at));
            area.legend(at, &format!("{name}  {}", label(values[(values.len() - 1) / 2])));
        }
        area.end()
    }
}

/// Phases one after the other.
pub struct Waterfall<'a> {
    /// Names and milliseconds, in order.
    pub bars: Vec<(&'a str, f64)>,
}

impl Waterfall<'_> {
    /// The drawing.
    pub fn draw(&self) -> String {
        const ROW: f64 = 22.0;
        let mut area = Area::new(TOP + BOTTOM + self.bars.len() as f64 * ROW);
        let total: f64 = self.bars.iter().map(|(_, took)| took).sum();
        let scale = Area::inner_width() / total.max(f64::MIN_POSITIVE);
        for quarter in 0..=4 {
            let value = total * f64::from(quarter) / 4.0;
            area.vertical(LEFT + value * scale, &label(value));
        }
        let mut began = 0.0;
        for (at, (name, took)) in self.bars.iter().enumerate() {
            let y = TOP + at as f64 * ROW;
            let (x, width) = (LEFT + began * scale, (took * scale).max(1.0));
            write!(
                area.svg,
                "<rect x='{x:.1}' y='{:.1}' width='{width:.1}' height='{:.1}' fill='{}'/>",
                y + 3.0,
                ROW - 6.0,
                colour(at)
            )
            .expect("strings take all");
            area.text(LEFT - 6.0, y + 15.0, "end", name);
            area.text(x + width + 5.0, y + 15.0, "start", &format!("{} ms", label(*took)));
            began += took;
        }
        area.text(WIDTH - 8.0, area.height - 18.0, "end", &format!("{} ms in all", label(total)));
        area.end()
    }
}

/// A named curve.
pub struct Curve {
    /// What it shows.
    pub name: String,
    /// From left to right.
    pub points: Vec<(f64, f64)>,
}

/// KiB a fork over the number of forks.
pub fn curves(curves: &[Curve]) -> String {
    let mut area = Area::new(320.0);
    let all = || curves.iter().flat_map(|curve| curve.points.iter().copied());
    let right = all().map(|point| point.0).fold(1.0, f64::max);
    let top = nice(all().map(|point| point.1).fold(1.0, f64::max));
    let bottom = -nice(-all().map(|point| point.1).fold(0.0, f64::min));
    let inner = area.inner_height();
    let x = |value: f64| LEFT + value / right * Area::inner_width();
    let y = |value: f64| TOP + (top - value) / (top - bottom) * inner;
    for quarter in 0..=4 {
        let part = f64::from(quarter) / 4.0;
        area.vertical(x(right * part), &label(right * part));
        let value = bottom + (top - bottom) * part;
        area.horizontal(y(value), &label(value));
    }
    area.text(WIDTH - RIGHT, area.height - 4.0, "end", "forks; KiB of each");
    for (at, curve) in curves.iter().enumerate() {
        let points: Vec<(f64, f64)> = curve.points.iter().map(|point| (x(point.0), y(point.1))).collect();
        area.path(&points, colour(at));
        let last = curve.points.last().map_or(0.0, |point| point.1);
        area.legend(at, &format!("{}  {}", curve.name, label(last)));
    }
    area.end()
}

/// The next of 1, 2, 5, 10 ... that is not smaller; 0 for what is not above 0.
fn nice(value: f64) -> f64 {
    if value <= 0.0 {
        return 0.0;
    }
    let decade = 10_f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|step| step * decade).find(|&step| step >= value).unwrap_or(value)
}

/// Three digits.
fn label(value: f64) -> String {
    let magnitude = value.abs();
    let text = match magnitude {
        _ if magnitude >= 100.0 || magnitude == 0.0 => return format!("{value:.0}"),
        _ if magnitude >= 10.0 => format!("{value:.1}"),
        _ if magnitude >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    };
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
