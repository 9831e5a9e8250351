package main

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/longshore-edge/longshore/cloudhub/internal/intake"
)

// registry reads the counters of the parts when it is scraped. No metric carries the name of an edge.
func (h *hub) registry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	counter := func(name, help string, read func() uint64) {
		r.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: "longshore", Name: name, Help: help},
			func() float64 { return float64(read()) }))
	}
	gauge := func(name, help string, read func() int64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "longshore", Name: name, Help: help},
			func() float64 { return float64(read()) }))
	}
	b, m := h.broker.Stats, h.mirror.Stats
	gauge("connections", "MQTT connections.", func() int64 { return b().Connections })
	counter("connections_accepted_total", "MQTT connections accepted.", func() uint64 { return uint64(b().Accepted) })
	counter("connections_refused_total", "MQTT connections refused.", func() uint64 { return uint64(b().Refused) })
	gauge("token_file_broken", "1 while the token file cannot be read: who was enrolled before stays enrolled, nobody is added or revoked.", func() int64 {
		if h.tokens.Err() != nil {
			return 1
		}
		return 0
	})
	counter("connections_stalled_total", "MQTT connections closed because the peer took no bytes.", func() uint64 { return uint64(b().Stalled) })
	counter("broker_dropped_total", "Messages the broker dropped because a client's queue was full.", func() uint64 { return uint64(b().Dropped) })
	counter("received_bytes_total", "Bytes received over MQTT.", func() uint64 { return uint64(b().BytesIn) })
	counter("sent_bytes_total", "Bytes sent over MQTT.", func() uint64 { return uint64(b().BytesOut) })

	gauge("sessions", "Edge hubs connected.", func() int64 { return m().Sessions })
	gauge("sessions_in_sync", "Edge hubs connected that hold the newest list.", func() int64 { return m().InSync })
	counter("sessions_opened_total", "Sessions opened.", func() uint64 { return m().Opened })
	counter("sessions_refused_total", "Connections of enrolled edges closed for a reason.", func() uint64 { return m().Refused })
	counter("sessions_superseded_total", "Instances told that another one with the same identity took over.", func() uint64 { return m().Superseded })
	counter("heads_total", "Signed heads sent.", func() uint64 { return m().Heads })
	counter("chunks_total", "Messages with objects sent.", func() uint64 { return m().Chunks })
	counter("fetches_total", "Objects asked for by edges.", func() uint64 { return m().Fetches })
	counter("plain_messages_total", "Plain JSON messages sent.", func() uint64 { return m().Plain })
	counter("acks_total", "Telemetry acknowledgements sent.", func() uint64 { return m().Acks })
	counter("proofs_total", "Views of an edge proved against the source.", func() uint64 { return m().Proofs })
	counter("proofs_failed_total", "Proofs that failed; the edge is sent no change meanwhile.", func() uint64 { return m().ProofsFailed })
	counter("telemetry_messages_total", "Telemetry messages received.", func() uint64 { return m().Telemetry })
	counter("telemetry_refused_total", "Telemetry messages not taken; edges send them again.", func() uint64 { return m().TelemetryRefused })
	gauge("telemetry_blocked", "1 while telemetry cannot be stored, such as on a full disk; edges keep it meanwhile, the log says what to do.", func() int64 {
		if h.intake.Blocked() != nil {
			return 1
		}
		return 0
	})
	counter("reports_refused_total", "Reports of edges ignored in whole or in part.", func() uint64 { return m().ReportsRefused })

	file := func(name, help string, ready bool) {
		gauge(name, help, func() (n int64) {
			for _, s := range h.files.Status() {
				if s.Ready == ready {
					n++
				}
			}
			return n
		})
	}
	file("model_files_ready", "Model files that edges can fetch.", true)
	file("model_files_missing", "Model files that a Model names and that are not here (yet).", false)
	r.MustRegister(newLedgerCollector(h.intake))
	return r
}

// ledgerCollector reads the books of all edges when it is scraped.
type ledgerCollector struct {
	intake *intake.Intake
	// records by what became of them.
	records *prometheus.Desc
}

// ledgerTimeout bounds one look at the books.
const ledgerTimeout = 5 * time.Second

func newLedgerCollector(in *intake.Intake) *ledgerCollector {
	return &ledgerCollector{in, prometheus.NewDesc("longshore_telemetry_records_total",
		"Telemetry records of all edges: accepted by edges, delivered to the store, ledgered as lost, booked twice (always 0), received again, in conflict.",
		[]string{"state"}, nil)}
}

// Describe implements prometheus.Collector.
func (c *ledgerCollector) Describe(d chan<- *prometheus.Desc) { d <- c.records }

// Collect implements prometheus.Collector.
func (c *ledgerCollector) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), ledgerTimeout)
	defer cancel()
	sums, _, err := c.intake.Ledger(ctx, intake.Query{Limit: 1})
	if err != nil {
		out <- prometheus.NewInvalidMetric(c.records, err)
		return
	}
	var all intake.Sum
	for _, s := range sums {
		all.Accepted += s.Accepted
		all.Delivered += s.Delivered
		all.Ledgered += s.Ledgered
		all.Duplicates += s.Duplicates
		all.Resent += s.Resent
		all.Conflicts += s.Conflicts
	}
	for state, n := range map[string]uint64{
		"accepted": all.Accepted, "delivered": all.Delivered, "ledgered": all.Ledgered,
		"duplicate": all.Duplicates, "resent": all.Resent, "conflict": all.Conflicts,
	} {
		out <- prometheus.MustNewConstMetric(c.records, prometheus.CounterValue, float64(n), state)
	}
}
