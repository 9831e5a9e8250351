package local

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/longshore-edge/longshore/broker"
	"github.com/longshore-edge/longshore/sync/outbox"
	"github.com/longshore-edge/longshore/sync/topic"
)

// device is the name of clients without credentials of their own.
const device = "device"

// mqtt5 is the protocol level of MQTT 5.
const mqtt5 = 5

// listener names the broker's one door.
const listener = "devices"

// Stream maps topics to a telemetry stream.
type Stream struct {
	Name string
	// Topics are MQTT topic filters.
	Topics []string
}

// Appender puts records on disk; *outbox.Log is one.
type Appender interface {
	Append(ctx context.Context, recs []outbox.Record) (verdicts []error, err error)
	LoseTooLarge(stream string, n int) error
}

// Config of a Broker.
type Config struct {
	Logger *slog.Logger
	// Listen is the address for devices, host:port. A client needs no credentials.
	Listen string
	// MaxConnections of devices (10,000).
	MaxConnections int
	// Streams in order: the first with a matching filter takes a message; a message that none takes is only fanned out.
	Streams []Stream
	Outbox  Appender
	// Offer is given every accepted message, for the models' bindings. It must not block.
	Offer func(topic string, payload []byte)
}

// Broker serves devices. Create it with New, then call Run once.
type Broker struct {
	cfg Config
	mq  *broker.Broker

	mu       sync.Mutex
	unstored uint64 // guarded by mu
	why      error  // guarded by mu: of the newest message not stored

	// complained is when a message too large for a stream was last logged. Of the goroutine that stores only.
	complained map[string]time.Time
}

// complainPause is the least time between two lines in the log about messages too large for one stream.
const complainPause = time.Minute

// New checks the configuration and opens the listener, so that a taken port is an error here. It starts nothing.
func New(cfg Config) (*Broker, error) {
	b := &Broker{cfg: cfg, complained: map[string]time.Time{}}
	for _, s := range cfg.Streams {
		for _, f := range s.Topics {
			if err := topic.ValidFilter(f); err != nil {
				return nil, fmt.Errorf("stream %q: %w", s.Name, err)
			}
		}
	}
	var err error
	b.mq, err = broker.New(broker.Config{
		Logger:    cfg.Logger,
		Listeners: []broker.Listener{{Name: listener, Address: cfg.Listen}},
		Auth:      anyone{},
		Store:     b.store,

		MaxConnections: cfg.MaxConnections,
	})
	if err != nil {
		return nil, fmt.Errorf("open the devices' broker: %w", err)
	}
	return b, nil
}

// Run serves until ctx ends.
func (b *Broker) Run(ctx context.Context) error { return b.mq.Run(ctx) }

// Addr returns the address devices connect to.
func (b *Broker) Addr() net.Addr { return b.mq.Addr(listener) }

// Publish fans a message of the agent's own out to local subscribers.
func (b *Broker) Publish(ctx context.Context, name string, payload []byte) error {
	return b.mq.Publish(ctx, name, payload, 1, false)
}

// Stats returns the broker's counters.
func (b *Broker) Stats() broker.Stats { return b.mq.Stats() }

// store puts what belongs to a stream on disk; its verdict decides on the PUBACK.
func (b *Broker) store(ctx context.Context, batch []broker.Message) []error {
	verdicts := make([]error, len(batch))
	var recs []outbox.Record
	var at []int
	for i, m := range batch {
		if s := b.stream(m.Topic); s != "" {
			recs = append(recs, outbox.Record{Stream: s, Topic: m.Topic, Payload: m.Payload})
			at = append(at, i)
		}
	}
	if len(recs) > 0 {
		stored, err := b.cfg.Outbox.Append(ctx, recs)
		large := map[string][]int{} // what is too large, of clients that can't be told, by stream
		for k, i := range at {
			verdict := stored[k]
			switch {
			case errors.Is(verdict, outbox.ErrTooLarge):
				if verdicts[i] = b.tooLarge(recs[k].Stream, batch[i], verdict); batch[i].Version != mqtt5 {
					large[recs[k].Stream] = append(large[recs[k].Stream], i)
				}
			case err != nil:
				verdicts[i] = b.refuse(recs[k].Stream, err)
			case verdict != nil:
				verdicts[i] = b.refuse(recs[k].Stream, verdict)
			}
		}
		for stream, which := range large {
			if err := b.cfg.Outbox.LoseTooLarge(stream, len(which)); err != nil {
				for _, i := range which {
					verdicts[i] = err
				}
			}
		}
	}
	for i, m := range batch {
		if verdicts[i] == nil {
			b.cfg.Offer(m.Topic, m.Payload)
		}
	}
	return verdicts
}

func (b *Broker) stream(name string) string {
	for _, s := range b.cfg.Streams {
		for _, f := range s.Topics {
			if topic.Match(f, name) {
				return s.Name
			}
		}
	}
	return ""
}

// tooLarge is refuse for a message that can never be stored.
func (b *Broker) tooLarge(stream string, m broker.Message, err error) error {
	err = fmt.Errorf("%w: %w", broker.ErrUnstorable, b.refuse(stream, err))
	if now := time.Now(); now.Sub(b.complained[stream]) >= complainPause {
		b.complained[stream] = now
		b.cfg.Logger.Warn("message can never be stored: let the device send smaller ones, or raise the stream's maxBytes",
			"stream", stream, "client", m.ClientID, "topic", m.Topic, "bytes", len(m.Payload), "error", err)
	}
	return err
}

// refuse counts a message that is not stored and says why; the broker logs it.
func (b *Broker) refuse(stream string, err error) error {
	if errors.Is(err, outbox.ErrFull) && !errors.Is(err, outbox.ErrDiskLow) {
		err = fmt.Errorf("%w: raise its maxBytes, or set its policy to drop-oldest", err)
	}
	err = fmt.Errorf("stream %q: %w", stream, err)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unstored++
	b.why = err
	return err
}

// Unstored returns how many messages were not stored since the start, and why the newest was not.
func (b *Broker) Unstored() (n uint64, why error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.unstored, b.why
}

// anyone lets every client in, as a device.
type anyone struct{}

func (anyone) Authenticate(context.Context, broker.Login) (broker.Identity, error) {
	return broker.Identity{Name: device, Access: deviceAccess{}}, nil
}

// deviceAccess keeps devices out of Longshore's own topics and the broker's.
type deviceAccess struct{}

func (deviceAccess) Publish(name string) bool { return !reserved(name) }

func (deviceAccess) Subscribe(filter string) bool { return !reserved(filter) }

func reserved(name string) bool {
	first, _, _ := strings.Cut(name, "/")
	return first == "longshore" || first == "$SYS"
}
